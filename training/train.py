"""Trains the embedded world model from nothing, or from a checkpoint, to weights: autoencoder, then transformer.

    python training/train.py --out out --ae-seconds 300 --deadline $(($(date +%s) + 1500))
    python training/train.py --out out --resume models/world --ae-seconds 0 --dit-seconds 1200
    python training/train.py --smoke          # a few steps of everything at full size
    python training/train.py --tiny --ranks 2 --ae-steps 4 --dit-steps 8 --out build/tiny-run

One process per GPU (`--ranks`, all by default). Batch sizes are per GPU. See training/README.md.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing

import overworld
from autoencoder_stage import train_autoencoder
from checkpoint import Saver, load_config, load_weights
from clips import CLIP_FRAMES
from model import SamplerConfig, TextEncoderConfig, WorldConfig, WorldModel, tiny_config
from optim import broadcast_parameters
from run import Progress, Run, warm_processes
from transformer_stage import FROM_NOTHING, KINDS, RESUMED, TransformerTrainer


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="training/build/run", help="folder of checkpoints and the log")
    parser.add_argument("--resume", help="folder to start from: a training folder, parts, or a model folder")
    parser.add_argument("--ae-seconds", type=float, default=300, help="autoencoder stage; 0 keeps the one resumed from")
    parser.add_argument("--dit-seconds", type=float, default=1000, help="transformer stage; 0 leaves it out")
    parser.add_argument("--probe-seconds", type=float, default=60, help="of --dit-seconds: prompts without pictures")
    parser.add_argument("--deadline", type=float, help="epoch second at which all is saved; replaces --dit-seconds")
    parser.add_argument("--ae-steps", type=int, help="steps in place of seconds (tests)")
    parser.add_argument("--dit-steps", type=int, help="steps in place of seconds (tests)")
    parser.add_argument("--probe-steps", type=int, help="steps in place of seconds (tests)")
    parser.add_argument("--ae-batch", type=int, default=128, help="pictures a step")
    parser.add_argument("--frames", type=int, default=256, help="frames a step of the transformer, whatever the clips")
    parser.add_argument("--prompts", type=int, default=128, help="prompts without clips a step")
    parser.add_argument("--ranks", type=int, help="processes; default: one per GPU")
    parser.add_argument("--threads", type=int, default=12, help="clip threads per process")
    parser.add_argument("--seed", type=int, default=0, help="another one, other worlds")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a model for CPU tests")
    parser.add_argument("--smoke", action="store_true", help="few steps of both stages at full size")
    parser.add_argument("--warm", choices=KINDS, help="only compile the graphs of one kind of clip")
    args = parser.parse_args()
    args.cuda = torch.cuda.is_available()
    args.ranks = args.ranks or max(1, torch.cuda.device_count())
    if args.smoke:
        args.ae_steps, args.probe_steps, args.dit_steps = (12 if args.ae_seconds else None), 12, 24
        args.threads = min(args.threads, 12)
    if args.tiny:
        args.ae_batch, args.frames, args.prompts, args.threads = 4, 32, 8, 1
    return args


def initial_model(args: argparse.Namespace, words: list[str]) -> WorldModel:
    if args.resume:
        model = WorldModel(load_config(args.resume))
        model.load_state_dict(load_weights(args.resume))
        return model
    if args.tiny:
        return WorldModel(tiny_config(len(words)))
    return WorldModel(WorldConfig(text_encoder=TextEncoderConfig(vocab_size=len(words)), sampler=SamplerConfig()))


def worker(rank: int, args: argparse.Namespace) -> None:
    if args.cuda and args.ranks > 1:  # every process sees one GPU, number 0, so that all share the compiled graphs
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[rank] if len(visible) >= args.ranks else str(rank)
    run = Run(rank, args.ranks, args.out, "cuda" if args.cuda else "cpu", not args.no_compile)
    torch.manual_seed(args.seed)
    words = overworld.vocabulary()
    model = initial_model(args, words).to(run.device)
    broadcast_parameters(model)
    if run.cuda:
        model.autoencoder.to(memory_format=torch.channels_last)
    torch.manual_seed(args.seed + 1000 * (rank + 1))  # noise differs between processes
    sizes = {kind: max(1, args.frames // CLIP_FRAMES[kind]) for kind in KINDS}
    if args.tiny:
        sizes.pop("memory")  # too long for a CPU
    if args.warm:
        TransformerTrainer(run, model, {args.warm: sizes[args.warm]}, FROM_NOTHING).warm_only(args.warm)
        return
    run.log(f"{args.ranks} processes on {run.device.type}, {sum(p.numel() for p in model.parameters()):,} parameters")

    warmers = []
    if run.main and run.cuda and run.compile and args.dit_seconds > 0:
        command = [sys.executable, __file__, "--ranks", "1", "--frames", str(args.frames)]
        command += ["--out", f"{args.out}/warm", "--warm"]
        warmers = warm_processes(command, list(sizes), run.out)
    saver = Saver(run.out, model.config, words)

    if args.ae_seconds > 0 or args.ae_steps:
        progress = Progress(run, args.ae_seconds, args.ae_steps)

        def save_autoencoder(weights: dict) -> None:
            state = model.state_dict() | {f"autoencoder.{name}": value for name, value in weights.items()}
            saver.save(state, {"stage": "autoencoder", "step": progress.step})

        train_autoencoder(run, model, args.ae_batch, progress, args.threads, save_autoencoder)
        broadcast_parameters(model)  # the latents' statistics too: GPUs round differently
        if run.main:
            saver.save(model.state_dict(), {"stage": "autoencoder done"})

    if args.dit_seconds > 0:
        begin = time.time()
        for process in warmers:
            try:
                process.wait(timeout=max(1, begin + 240 - time.time()))
            except subprocess.TimeoutExpired:
                process.kill()
        run.barrier()
        run.log(f"waited {time.time() - begin:.1f} s for the graphs")
        trainer = TransformerTrainer(run, model, sizes, RESUMED if args.resume else FROM_NOTHING, args.prompts)
        state_file = Path(args.resume or "", "state.pt")
        if args.resume and state_file.exists():
            trainer.resume(torch.load(state_file, map_location=run.device))

        def save(weights: dict, state: dict, where: dict) -> None:
            if not saver.save(model.state_dict() | weights, where, state):
                run.log("averaged weights are not finite: checkpoint not replaced")

        trainer.prepare(args.threads, args.seed)
        left = args.deadline - time.time() - 15 if args.deadline else args.dit_seconds
        left -= args.probe_seconds
        trainer.learn_places(Progress(run, args.probe_seconds, args.probe_steps))
        trainer.train(Progress(run, run.shared(left), args.dit_steps), save)
        trainer.stop()
    saver.wait()
    run.barrier()
    run.log("done")
    if args.ranks > 1:
        torch.distributed.destroy_process_group()


def main() -> None:
    args = arguments()
    random.seed(args.seed)
    np.random.seed(args.seed)
    overworld.vocabulary()  # builds the library before the processes start
    if args.ranks == 1:
        worker(0, args)
        return
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(29500 + os.getpid() % 1000))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine, perhaps without a network
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(worker, (args,), args.ranks)


if __name__ == "__main__":
    main()
