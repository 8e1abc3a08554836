"""The quickstart: the preset `toy` of `hf-sam reproduce`, on two CPU cores in about 6 minutes.

python recipes/quickstart.py
"""

import sys

from hf_sam.commands import main

if __name__ == "__main__":
    sys.exit(main(["reproduce", "--preset", "toy", *sys.argv[1:]]))
