"""Experiments from presets: pretrain, anneal in several ways, fine-tune over a sweep, evaluate, compare.

- `presets`: the YAML files in `configs/presets`, or your own
- `experiment`: a preset as stages
- `stages`: which stages are finished, and running one of them
- `driver`: runs all that are not finished, side by side on the devices of a machine
- `toy_data`: text and word problems for the preset `toy`, without a network
"""
