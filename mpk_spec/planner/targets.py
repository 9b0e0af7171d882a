"""The machines a plan can be made for, as a table, so that planning needs no GPU.

Figures are the makers' data sheets, except `stream_gbps`, the streaming-read ceiling that one kernel reaches: measured
on H100 (3150 of 3352 GB/s) and H200 (4600 of 4814), 94 % of theoretical elsewhere. `hop_us` is one event from producer
to consumer (`red.release.gpu` to `ld.acquire.gpu`), measured on the same two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mpk_spec.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Target:
    name: str
    title: str
    arch: str  # what NVRTC is asked for; "cpu" has none
    num_sms: int
    smem_bytes: int  # of one block, the opt-in limit
    registers: int  # 32-bit registers of one SM
    l2_bytes: int
    memory_bytes: int
    theoretical_gbps: float
    stream_gbps: float
    tflops_bf16: float
    hop_us: float  # one event
    peer_hop_us: float  # one flag to a peer GPU


KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

TARGETS = {
    t.name: t
    for t in (
        Target(
            "a100",
            "NVIDIA A100 80GB SXM",
            "sm_80",
            108,
            163 * KIB,
            65536,
            40 * MIB,
            80 * GIB,
            2039,
            1917,
            312,
            0.80,
            2.0,
        ),
        Target(
            "h100",
            "NVIDIA H100 80GB SXM",
            "sm_90a",
            132,
            227 * KIB,
            65536,
            50 * MIB,
            80 * GIB,
            3352,
            3150,
            989,
            0.66,
            1.23,
        ),
        Target(
            "h200",
            "NVIDIA H200 141GB SXM",
            "sm_90a",
            132,
            227 * KIB,
            65536,
            60 * MIB,
            141 * GIB,
            4814,
            4600,
            989,
            0.62,
            1.23,
        ),
        Target(
            "b200",
            "NVIDIA B200 180GB",
            "sm_100a",
            148,
            227 * KIB,
            65536,
            126 * MIB,
            180 * GIB,
            8000,
            7520,
            2250,
            0.70,
            1.3,
        ),
        Target(
            "rtx4090",
            "NVIDIA GeForce RTX 4090",
            "sm_89",
            128,
            99 * KIB,
            65536,
            72 * MIB,
            24 * GIB,
            1008,
            948,
            165,
            0.70,
            3.0,
        ),
        Target("cpu", "the CPU reference", "cpu", 4, 227 * KIB, 65536, 32 * MIB, 64 * GIB, 50, 40, 1, 0.0, 0.0),
    )
}


def find_target(name: str) -> Target:
    """The target of that name; UserError naming the known ones.

    "h100:4" is an H100 of which a plan takes 4 SMs, for tools that slow each of them down a hundredfold.
    """
    whole, colon, sms = name.lower().partition(":")
    if whole not in TARGETS:
        raise UserError(f"unknown target '{name}'", did_you_mean(whole, TARGETS, "targets"))
    target = TARGETS[whole]
    if not colon:
        return target
    if not sms.isdecimal() or not 1 <= int(sms) <= target.num_sms:
        raise UserError(f"'{name}' names no part of {target.title}", f"it has 1 to {target.num_sms} SMs: {whole}:4")
    return replace(target, name=f"{whole}:{int(sms)}", num_sms=int(sms))


def target_of(name: str, arch: str, num_sms: int) -> Target:
    """The target that a GPU is, by its name, architecture ("sm_90") and number of SMs; UserError if it is none."""
    alike = [t for t in TARGETS.values() if t.arch.rstrip("a") == arch and t.num_sms == num_sms]
    if not alike:
        known = ", ".join(f"{t.title} ({t.arch}, {t.num_sms} SMs)" for t in TARGETS.values() if t.arch != "cpu")
        raise UserError(f"no target is like this GPU: {name}, {arch}, {num_sms} SMs", f"targets: {known}")
    return next((t for t in alike if t.name.upper() in name.upper()), alike[0])
