"""The quickstart: the preset `toy` of recipes/reproduce.py, on two CPU cores in some minutes.

python recipes/quickstart.py
"""

import sys

from reproduce import main

if __name__ == "__main__":
    sys.exit(main(["--preset", "toy", *sys.argv[1:]]))
