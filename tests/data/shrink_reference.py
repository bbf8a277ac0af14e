"""Cuts a reference run (training/reference.py) to every n-th entry of each tensor's first axis, so that it can be committed.

    python tests/data/shrink_reference.py build/tiny/reference.safetensors tests/data/tiny/reference.safetensors
"""

import argparse

from safetensors.torch import load_file, save_file

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("source")
parser.add_argument("output")
parser.add_argument("--stride", type=int, default=4)
args = parser.parse_args()

WHOLE = ("prompt.ids", "cameras")  # inputs of the run
tensors = {
    name: value if name in WHOLE else value[:: args.stride].contiguous() for name, value in load_file(args.source).items()
}
save_file(tensors, args.output, metadata={"stride": str(args.stride)})
