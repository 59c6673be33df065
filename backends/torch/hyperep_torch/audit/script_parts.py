# SPDX-License-Identifier: Apache-2.0
"""The part of generated scripts that is the same in all of them. It is copied from its mark on, and not imported.

Where it names what is not defined here, the script defines it before: see ``script.py``.
"""
# ruff: noqa: D103, F821
# mypy: ignore-errors

import faulthandler
import tempfile

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor


def _scores(logits): ...


def _divided(kept): ...


def _expert(w, x): ...


# --- from here on
def expert(w, x):
    return _expert(w, x)


def dense(w, x):
    """The layer without parallelism: every token through its experts, in float64."""
    logits = x @ w["router"].mT
    scores = _scores(logits)
    kept, chosen = scores.topk(CLAIMS.sizes.top_k)
    kept, out = _divided(kept), torch.zeros_like(x)
    for e in range(CLAIMS.sizes.experts):
        mine = {name: w[name][e] for name in w if name != "router" and not name.startswith("shared_")}
        out = out + SCALE * (kept * (chosen == e)).sum(-1, keepdim=True) * expert(mine, x)
    if CLAIMS.shared:
        out = out + expert({name.removeprefix("shared_"): w[name] for name in w if name.startswith("shared_")}, x)
    return out


def parameters(layer, name, whole):
    """The parameters that make up this rank's part of a weight."""
    found = dict(layer.named_parameters())
    name = NAMES.get(name, name)
    return [found[n] for n in ([name.format(i) for i in range(whole[0])] if "{}" in name else [name]) if n in found]


def my_part(whole, like):
    """This rank's part of a whole array, for parameters *like* these."""
    if isinstance(like[0], DTensor):
        return [distribute_tensor(whole, like[0].device_mesh, like[0].placements, src_data_rank=None).to_local()]
    if like[0].shape == whole.shape:
        return [whole]
    parts = whole.shape[0] // (len(like) if like[0].ndim < whole.ndim else like[0].shape[0])
    mine = whole.chunk(parts)[dist.get_rank() % parts]
    return list(mine) if like[0].ndim < whole.ndim else [mine]


def whole_gradient(held, shape):
    """The gradient put together, and whether a part of it is None. Collective."""
    absent = any(p.grad is None for p in held)
    for p in held:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if isinstance(held[0], DTensor):
        return held[0].grad.full_tensor(), absent
    mine = torch.stack([p.grad for p in held]) if held[0].ndim < len(shape) else held[0].grad
    if tuple(mine.shape) == tuple(shape):
        return mine, absent
    parts = [torch.empty_like(mine) for _ in range(RANKS)]
    dist.all_gather(parts, mine.contiguous())
    return torch.cat(parts)[: shape[0]], absent


def compare(what, found, right):
    """One line: the relative error, and by which factor the two differ."""
    found, right = found.detach().double().cpu(), right.detach().double().cpu()
    size = right.norm().item()
    error = ((found - right).norm() / max(size, 1e-12)).item() if found.shape == right.shape else float("inf")
    told = ""  # nothing is a part of zero
    if size and found.shape == right.shape:
        told = f", observed / expected {(found * right).sum().item() / size**2:.4f}"
    verdict = "ok" if error <= TOLERANCE else "WRONG"
    print(f"{verdict:5} {what}: relative error {error:.3g}{told}", flush=True)


def on_rank(rank, folder):
    faulthandler.dump_traceback_later(60, exit=True)  # whoever hangs says where
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    layers, wholes = [], []
    for number in range(LAYERS):
        torch.manual_seed(SEED)
        layer, wanted = make(CLAIMS), weights_of(SHAPES, SEED + number)
        placed = TO_LAYER(wanted) if TO_LAYER else wanted
        for name, value in placed.items():
            held = parameters(layer, name, value.shape)
            for parameter, part in zip(held, my_part(torch.tensor(value), held), strict=True):
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                local.data.copy_(part)
        layers.append(layer)
        wholes.append({name: torch.tensor(value, requires_grad=True) for name, value in wanted.items()})
    calls, due, lines = {}, [], []
    for verb, *objects in ACTIONS:
        number = int(objects[0][-1]) if objects and objects[0][-1].isdigit() else 0
        if verb == "forward":
            batch, layer = objects[0], layers[number]
            x = torch.tensor(TOKENS[batch][rank], dtype=DTYPE).reshape(-1, CLAIMS.sizes.dim).requires_grad_()
            mode = objects[1] if len(objects) > 1 else "train"
            call = CALL or (lambda layer, x: layer(x))
            if mode == "recompute":
                out = torch.utils.checkpoint.checkpoint(call, layer, x, use_reentrant=False)
            else:
                with torch.set_grad_enabled(mode == "train"):
                    out = call(layer, x)
            calls[batch] = x, out
            lines.append((f"output of batch {batch} on rank {rank}", out, dense(wholes[number], x.detach().double())))
        elif verb == "backward":
            batch = objects[0]
            x, out = calls[batch]
            g = torch.tensor(COTANGENTS[batch][rank], dtype=torch.float64).reshape(x.shape)
            if out.requires_grad or len(x):
                out.backward(g.to(out.dtype))
            due.append((number, batch))
            again = x.detach().double().requires_grad_()
            (right,) = torch.autograd.grad((dense(wholes[number], again) * g).sum(), again)
            got = torch.zeros_like(x) if x.grad is None else x.grad
            lines.append((f"gradient of the tokens of batch {batch} on rank {rank}", got, right))
        elif verb == "finish" and REDUCE:
            REDUCE(layers[number])
        elif verb == "zero":
            due = [d for d in due if d[0] != number]
            for layer in layers:
                layer.zero_grad(set_to_none=True)
        elif verb == "freeze":
            marked = {n: np.full(s, (n == "router") == (objects[0] == "router")) for n, s in SHAPES.items()}
            for name, mark in (TO_LAYER(marked) if TO_LAYER else marked).items():
                for parameter in (p for layer in layers for p in parameters(layer, name, mark.shape) if mark.all()):
                    parameter.requires_grad_(False)
        elif verb == "gradients":
            number = int(objects[1]) if len(objects) > 1 else 0
            lines += gradients(layers[number], wholes[number], [b for n, b in due if n == number], rank)
    for turn in range(RANKS):
        dist.barrier()
        if turn == rank:
            for line in lines:
                compare(*line)
    dist.destroy_process_group()


def gradients(layer, whole, batches, rank):
    """Every gradient of this layer beside the right one."""
    shapes = TO_LAYER(weights_of(SHAPES, 0)) if TO_LAYER else weights_of(SHAPES, 0)
    held = {name: parameters(layer, name, value.shape) for name, value in shapes.items()}
    found, absent = {}, []
    for name, value in shapes.items():
        found[name], lacking = whole_gradient(held[name], value.shape)
        absent += [name] * lacking
    if absent:
        print(f"rank {rank}: no gradient (None) of {', '.join(absent)}", flush=True)
    found = {name: value.detach().double().numpy() for name, value in found.items()}
    found = FROM_LAYER(found) if FROM_LAYER else found
    for name, got in found.items():
        alone = OWN and all(p.shape == shapes.get(name, np.empty(0)).shape for p in held.get(name, []))
        ranks = [rank] if alone or SHARED_BATCH else range(RANKS)
        loss = 0.0
        for batch in batches:
            for r in ranks:
                x = torch.tensor(TOKENS[batch][r], dtype=torch.float64).reshape(-1, CLAIMS.sizes.dim)
                g = torch.tensor(COTANGENTS[batch][r], dtype=torch.float64).reshape(x.shape)
                loss = loss + (dense(whole, x) * g).sum() / (RANKS if MEAN and not SHARED_BATCH and not alone else 1)
        (right,) = torch.autograd.grad(loss, whole[name])
        yield f"gradient of {name} as rank {rank} has it", torch.tensor(np.asarray(got)), right


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(on_rank, (folder,), nprocs=RANKS)
