"""What fine-tuning and few bits cost each base model, and how much less than AdamW's (`hf-sam compare`).

    python recipes/quantize_eval.py --config recipes/configs/eval/metamath.yaml \
        --runs adamw=outputs/olmo2_1b_mid/adamw,outputs/sft/adamw sam=outputs/olmo2_1b_mid/sam,outputs/sft/sam
"""

import sys

from hf_sam.commands import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
