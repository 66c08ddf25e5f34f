"""CUDA graphs: all kernels of a training step, or of a sampler's evaluation, launched as one.

A CPU takes longer to launch the short kernels of a small model one by one than a GPU takes to run them.
A graph repeats the launches, but runs no Python.
"""

import functools
import threading

import torch

RECORD_FROM = 10  # evaluations of a run: recording one takes as long as four or five replays save
EAGER_CALLS = 3  # evaluations before the one that is recorded: kernels are compiled and chosen

_one_at_a_time = threading.Lock()


@functools.cache
def _stream(device):
    return torch.cuda.Stream(device)  # torch's own belongs to the device that recorded first


def record(function, tensors, pool):
    """(replay, tensors, results) of a graph of function(**tensors), which reads and writes these tensors.

    Other threads may launch and allocate meanwhile. pool: memory shared with graphs that run at other times.
    """
    tensors = {name: x.clone() for name, x in tensors.items()}
    graph, stream = torch.cuda.CUDAGraph(), _stream(next(iter(tensors.values())).device)
    with _one_at_a_time, torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
        results = function(**tensors)
    return graph.replay, tensors, results


class Recorded:
    """function(**tensors) by a graph for each set of shapes. A call overwrites what the last one returned."""

    def __init__(self, function, eager):
        self.function, self.eager = function, eager  # so many calls run as they are
        self.calls, self.graphs, self.pool = {}, {}, None

    def __call__(self, **tensors):
        kind = tuple((name, x.shape, x.dtype, x.device) for name, x in tensors.items())
        self.calls[kind] = self.calls.get(kind, 0) + 1
        if self.calls[kind] <= self.eager:
            return self.function(**tensors)
        if kind not in self.graphs:
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            self.graphs[kind] = record(self.function, tensors, self.pool)
        replay, own, results = self.graphs[kind]
        for name, x in tensors.items():
            own[name].copy_(x)
        replay()
        return results


def is_recordable(model):
    """Whether the model's class says that it is `launch_bound`, and no hook or compiler is in its way."""
    modules, tensors = list(model.modules()), [*model.parameters(), *model.buffers()]
    hooked = torch.nn.modules.module._has_any_global_hook() or any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in modules
    )
    compiled = any(module._compiled_call_impl is not None for module in modules)
    own_class = vars(type(model)).get("launch_bound", False)  # a subclass may do what cannot be recorded
    return own_class and not (hooked or compiled) and len({tensor.device for tensor in tensors}) == 1


def can_record(x):
    """Whether x is on a GPU, and what is launched now is neither differentiated, watched nor recorded."""
    watched = torch.utils._python_dispatch._get_current_dispatch_mode()
    return x.is_cuda and not (torch.is_grad_enabled() or watched or torch.cuda.is_current_stream_capturing())


def recorded_velocity(model, velocity, evaluations):
    """The model's velocity(x, t), launched by graphs where a run of so many evaluations pays for them."""
    if evaluations < RECORD_FROM or not is_recordable(model):
        return velocity
    recorded = Recorded(velocity, EAGER_CALLS)
    return lambda x, t, **end: recorded(x=x, t=t, **end).clone() if can_record(x) else velocity(x, t, **end)


def recorded_gradient(objective):
    """batch -> the loss objective(batch), launched by graphs, in whose memory it leaves the gradients.

    For one GPU, without recomputed layers. Aliases of the parameters are differentiated: a loss that someone
    still holds ties the parameters themselves to the stream it was computed on.
    """
    named = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    aliases = {name: torch.nn.Parameter(p.detach()) for name, p in named.items()}

    def gradient(**batch):
        for p in aliases.values():
            p.grad = None  # so that a graph writes gradients, and does not add to these
        loss = torch.func.functional_call(objective, aliases, (batch,))
        loss.backward()
        return loss.detach().float(), [p.grad for p in aliases.values()]

    recorded = Recorded(gradient, 1)

    def launched(**batch):
        loss, found = recorded(**batch)
        for p, grad in zip(named.values(), found, strict=True):
            p.grad = grad
        return loss.clone()

    return launched
