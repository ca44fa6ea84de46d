"""Memories in folders, all of whose samples were met once."""

from __future__ import annotations

import os

import torch

import contrastive_kernels as ck

FILES = ["lock", "log_mean.npy", "memory.json", "visits.npy"]


def make(folder, samples=4, directions=2, **options):
    """A memory all of whose samples were met once."""
    memory = ck.NormalizerMemory(samples, directions, storage=folder, **options)
    memory.update(torch.arange(samples), values(samples, directions))
    return memory


def values(samples, directions=2):
    return torch.arange(samples * directions, dtype=torch.float64).view(samples, directions) + 0.5


def check(memory, samples=4, directions=2):
    """The memory holds what ``make`` stored, and nothing behind it."""
    assert torch.equal(memory.log_mean[:samples], values(samples, directions))
    assert (memory.visits[:samples] == 1).all() and memory.visits[samples:].sum() == 0
    assert (memory.log_mean[samples:] == 0).all()
    assert memory.unvisited.tolist() == [memory.num_samples - samples] * directions


def names(folder):
    return sorted(os.listdir(folder))
