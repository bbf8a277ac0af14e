"""Writes a model folder with a tiny random model, to test an engine against `reference.py` without trained weights.

    python training/make_tiny.py build/tiny --storage int8
"""

import argparse

import torch

from model import SamplerConfig, WorldModel, save_model, tiny_config

WORDS = (
    "<pad> <unk> . , a and with land summer winter desert north south east west in the is there forest water red tower "
    "stands"
).split()


def randomise(model: torch.nn.Module) -> None:
    """Random values everywhere: fresh layers hold zeros and ones, behind which mistakes would hide."""
    for name, value in model.state_dict().items():
        if name.endswith(("norm1.weight", "norm2.weight", "norm_q.weight", "norm_k.weight", "latent_std")) or (
            value.ndim == 1 and name.endswith("weight")
        ):
            value.copy_(1 + 0.2 * torch.randn_like(value))
        elif value.ndim == 1:
            value.copy_(0.1 * torch.randn_like(value))
        elif name.endswith("modulation"):
            value.copy_(0.3 * torch.randn_like(value))
        else:
            value.copy_(torch.randn_like(value) / value[0].numel() ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--storage", choices=("int8", "bf16", "f32"), default="f32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2, help="sampling steps written to the configuration")
    parser.add_argument("--first-steps", type=int, default=3, help="the same for a frame without history")
    parser.add_argument("--sampler", choices=("ode", "renoise"), default="ode")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    config = tiny_config(len(WORDS))
    config.sampler = SamplerConfig(args.sampler, args.steps, first_steps=args.first_steps, first_shift=4.0)
    model = WorldModel(config)
    randomise(model)
    save_model(args.folder, config, model.state_dict(), WORDS, args.storage)
    print(f"{args.folder}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
