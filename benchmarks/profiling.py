"""Show where the time of a work goes, and what the CPU's own products of matrices would allow.

    python -m benchmarks.profiling [--model NAME] [--images 24] [--threads 2]

The rows are a training step, a descriptor in OpenVINO, and reading an image; a second table is of
OpenVINO's streams. "At the rate of a product" is how long the work's floating-point operations
would take if all of them ran as fast as one large product of matrices of that precision does, in
torch and on the same threads.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import openvino as ov
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from deen_zoo import create_model
from deen_zoo.data.images import open_image, resize
from deen_zoo.data.transforms import EvalTransform
from deen_zoo.device import keep_freed_memory
from deen_zoo.features.engines import HINTS, to_openvino

from . import workloads
from .contest import Spec

Parts = defaultdict[str, float]  # seconds of each part
# The first word that a name of torch's contains decides.
KINDS = {
    "batch_norm": "batch norms",
    "conv": "convolutions",
    "mm": "products of matrices",
    "copy": "copies between layouts and precisions",
}


def training(spec: Spec, precision: str) -> tuple[Parts, float, int]:
    """Seconds of each kind of operation of a step, of the step, and its operations."""
    step = workloads.training_step(f"torch {precision}", spec)
    with FlopCounterMode(display=False) as counter:  # the first step, which is not timed
        step()
    begin = time.perf_counter()
    step()
    seconds = time.perf_counter() - begin
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:
        step()
    parts: Parts = defaultdict(float)
    for event in found.key_averages():
        kind = next((kind for word, kind in KINDS.items() if word in event.key), "all else")
        parts[kind] += event.self_cpu_time_total / 1e6
    return parts, seconds, counter.get_total_flops()


def describing(spec: Spec, precision: str) -> tuple[Parts, float, int]:
    """The same of one visible image in OpenVINO, without the mirrored one."""
    model = create_model(spec.model).eval()
    graph = to_openvino(model, "visible", False, "official", EvalTransform(spec.size))
    settings = {"INFERENCE_PRECISION_HINT": HINTS[precision], "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": spec.threads, "PERF_COUNT": True}  # fmt: skip
    request = ov.Core().compile_model(graph, "CPU", settings).create_infer_request()
    pixels = np.random.default_rng(1).integers(0, 256, (1, *spec.size, 3), np.uint8)
    for _ in range(3):
        begin = time.perf_counter()
        request.infer([pixels])
        seconds = time.perf_counter() - begin
    parts: Parts = defaultdict(float)
    for node in request.get_profiling_info():
        units = " on AMX" if "amx" in node.exec_type else ""
        kinds = {"Convolution": "convolutions", "MatMul": "products of matrices"}
        parts[kinds.get(node.node_type, "all else") + units] += node.real_time.total_seconds()
    return parts, seconds, workloads.operations(replace(spec, images=1))


def streams(spec: Spec, precision: str, rounds: int = 9) -> dict[tuple[int, int], list[float]]:
    """Images per second of each round, by images at a time and streams, alternating."""
    model = create_model(spec.model).eval()
    graph = to_openvino(model, "visible", False, "official", EvalTransform(spec.size))
    queues: dict[tuple[int, int], Any] = {}
    for images, number in itertools.product((1, 4, 8), (1, 2)):
        graph.reshape([images, *spec.size, 3])
        settings = {"INFERENCE_PRECISION_HINT": HINTS[precision], "NUM_STREAMS": number,
                    "INFERENCE_NUM_THREADS": spec.threads}  # fmt: skip
        compiled = ov.Core().compile_model(graph, "CPU", settings)
        queues[images, number] = ov.AsyncInferQueue(compiled, number)
    rates: dict[tuple[int, int], list[float]] = {key: [] for key in queues}
    for _ in range(rounds):
        for (images, number), queue in queues.items():
            pixels, calls = np.zeros((images, *spec.size, 3), np.uint8), max(2, 32 // images)
            begin = time.perf_counter()
            for _ in range(calls):
                queue.start_async([pixels])
            queue.wait_all()
            rates[images, number].append(calls * images / (time.perf_counter() - begin))
    return rates


def reading(spec: Spec) -> tuple[Parts, float]:
    """Seconds of the stages of one image in one thread, and of all."""
    workloads.reading("1 thread", spec)  # makes the files
    paths = sorted(spec.folder.glob("reading-*.jpg")) * 8
    images = [open_image(path) for path in paths]
    pixels = [resize(image, spec.size) for image in images]
    parts: Parts = defaultdict(float)
    stages: dict[str, Callable[[], Any]] = {
        "opening and decoding": lambda: [open_image(path) for path in paths],
        "resizing (LANCZOS)": lambda: [resize(image, spec.size) for image in images],
        "putting into a batch": lambda: np.stack(pixels),
    }
    for name, stage in stages.items():
        begin = time.perf_counter()
        stage()
        parts[name] = (time.perf_counter() - begin) / len(paths)
    return parts, sum(parts.values())


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deen_resnet50_llcm")
    parser.add_argument("--images", type=int, default=24, help="of each modality in a step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    size = create_model(args.model).pretrained_cfg["input_size"][1:]
    print("| work | seconds | of which | operations | at the rate of a product |")
    print("|---|---:|---|---:|---:|")
    with workloads.scratch() as folder:
        spec = Spec(folder, None, args.model, args.images, tuple(size), "cpu", args.threads)
        for work, measure in (("training step", training), ("descriptor in OpenVINO", describing)):
            for precision in ("float32", "bfloat16"):
                parts, seconds, operations = measure(spec, precision)
                rate = workloads.product_rate(getattr(torch, precision), 4096, "cpu", 5)
                print(f"| {work}, {precision} | {seconds:.3g} | {shares(parts)} "
                      f"| {operations / 1e12:.3g} T | {operations / rate:.3g} s at "
                      f"{rate / 1e9:,.0f} GFLOP/s |", flush=True)  # fmt: skip
        parts, seconds = reading(spec)
        print(f"| one image read in one thread | {seconds:.3g} | {shares(parts)} | | |")
        print("\n| precision | images at a time | streams | images/s |\n|---|---:|---:|---:|")
        for precision in ("float32", "bfloat16"):
            for (images, number), rates in streams(spec, precision).items():
                middle, low, high = statistics.median(rates), min(rates), max(rates)
                row = f"{middle:.1f} ({low:.1f} to {high:.1f})"
                print(f"| {precision} | {images} | {number} | {row} |")


def shares(parts: Parts) -> str:
    """Each part's share of the whole, the greatest first."""
    total, ordered = sum(parts.values()), sorted(parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {part / total:.0%}" for name, part in ordered)


if __name__ == "__main__":
    main()
