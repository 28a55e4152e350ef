"""What pyproject.toml cannot say: the Triton files in kernels/ install as fastlora.kernels.

kernels/ has no __init__.py on purpose: a root package of that name would shadow Hugging Face's
`kernels`, which transformers imports.
"""

from setuptools import find_namespace_packages, find_packages, setup

KERNELS = find_namespace_packages("kernels", exclude=["*__pycache__*"])

setup(
    packages=[
        *find_packages(include=["fastlora", "fastlora.*"]),
        "fastlora.kernels",
        *(f"fastlora.kernels.{name}" for name in KERNELS),
    ],
    package_dir={"fastlora": "fastlora", "fastlora.kernels": "kernels"},
)
