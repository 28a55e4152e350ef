"""Small runs of ``fastlora bench`` and where their results lie."""

from benchmarks.harness import machine

SMALL = ["--device", "cpu", "--quick", "--threads", "1", "--shapes", "4,32,48,4", "--dtype", "fp32"]


def quick_folder(root):
    """Where ``--save root --quick`` puts its lines, once it has set the number of threads."""
    return root / (machine.name_folder("cpu") + "-quick")
