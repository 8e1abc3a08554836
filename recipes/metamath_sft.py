"""Fine-tuning over a sweep of learning rates, on MetaMathQA and the other datasets of the papers (`hf-sam sweep`).

    accelerate launch recipes/metamath_sft.py --config recipes/configs/sft/metamath.yaml \
        --model_name_or_path outputs/olmo2_1b_mid/sam --output_dir outputs/sft/sam
"""

import sys

from hf_sam.commands import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
