"""A whole experiment in one command: pretrain, anneal, fine-tune over a sweep, quantize, compare (`hf-sam reproduce`).

python recipes/reproduce.py --preset toy            # two CPU cores, about 6 minutes, real text
python recipes/reproduce.py --preset olmo2-1b       # a node of GPUs: the paper's headline
python recipes/reproduce.py --preset 20m --dry_run  # what it needs
"""

import sys

from hf_sam.commands import main

if __name__ == "__main__":
    sys.exit(main(["reproduce", *sys.argv[1:]]))
