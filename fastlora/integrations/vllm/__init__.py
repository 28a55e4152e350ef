"""fastlora as vLLM's LoRA kernels: ``plugin`` is what vLLM finds, everything else it loads later.

``plugin`` registers and decides, ``interface`` is what vLLM's wrapper must look like, ``wrapper``
and ``wrapper_cuda`` are the classes that vLLM makes. They only hand on to ``layers``, which knows
vLLM's tensors but imports nothing of it, and to ``step``, which rows have which adapter.
"""
