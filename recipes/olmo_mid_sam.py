"""Pretraining, annealing and mid-training with SAM: OLMo-2-1B on Dolmino, or any size on any text (`hf-sam pretrain`).

accelerate launch recipes/olmo_mid_sam.py --config recipes/configs/olmo2_1b_mid/sam.yaml
python recipes/olmo_mid_sam.py --config recipes/configs/olmo2_1b_mid/sam.yaml --dry_run
"""

import sys

from hf_sam.commands import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
