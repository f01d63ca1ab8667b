"""Large device tensors on their way through pinned host memory, where MPI does not take device memory itself.

In parts, through two buffers: while MPI has one part, the results of the part before go back and the part after
comes in, so that of the copies only the first and the last are waited for. They run on a stream of their own, between
what the caller has put on its stream before and what it will put there afterwards; nothing else is waited for.
"""

import torch

from .device import is_direct

# Bytes of a part: enough for MPI's full speed, little beside a gradient bucket (25 MB).
PART_BYTES = 8 << 20


def pays(tensor, *calls):
    """True for a tensor of a device that is worth several parts and does not go to the MPI `calls` itself.

    The same on all ranks: how a tensor is cut into parts must not hang on how a rank keeps it.
    """
    return tensor.layout is torch.strided and tensor.nbytes > PART_BYTES and not is_direct(tensor, *calls)


def plain(tensor):
    """`tensor` itself where its memory is its elements in their order, else a copy on its device."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous()


def through_host(sent, received, exchange):
    """Call `exchange` for every part of device tensors: what it is given is in host memory.

    sent, received: [rows, n] and [rows', n], contiguous, None where this rank has none of it, or both the same tensor;
    exchange: function of (sent [rows, w], received [rows', w]), contiguous host tensors, which are None, or one and the
    same, as the device tensors are.
    """
    tensors = [tensor for tensor in (sent, received) if tensor is not None]
    device, length = tensors[0].device, tensors[0].shape[1]
    widest = max(tensor.shape[0] * tensor.element_size() for tensor in tensors)
    width = min(length, max(1, PART_BYTES // widest))
    parts = [slice(start, min(start + width, length)) for start in range(0, length, width)]
    streams = torch.get_device_module(device)
    before, copies = streams.current_stream(device), streams.Stream(device)
    copies.wait_stream(before)
    buffers = [_Buffers(sent, received, width, streams.Event()) for _ in parts[:2]]
    with streams.stream(copies):
        for part, buffer in zip(parts, buffers, strict=False):  # the first two
            buffer.fill(part, copies)
    for number, part in enumerate(parts):
        buffer = buffers[number % 2]
        buffer.filled.synchronize()
        exchange(*buffer.hosts(part))
        with streams.stream(copies):
            buffer.drain(part)
            if number + 2 < len(parts):
                buffer.fill(parts[number + 2], copies)
    before.wait_stream(copies)


class _Buffers:
    """Host memory of one part: what goes out, and what comes in."""

    def __init__(self, sent, received, width, filled):
        self._sent, self._received, self.filled = sent, received, filled
        self._out = None if sent is None else self._host(sent, width)
        self._in = self._out if received is sent else None if received is None else self._host(received, width)

    @staticmethod
    def _host(tensor, width):
        # torch keeps pinned memory for later calls, and gives it to none before the copies from it are done.
        return torch.empty(tensor.shape[0] * width, dtype=tensor.dtype, pin_memory=not tensor.is_cpu)

    def hosts(self, part):
        """(what is sent, what is received) of `part`, as `exchange` is given it."""
        return self._rows(self._out, self._sent, part), self._rows(self._in, self._received, part)

    @staticmethod
    def _rows(host, tensor, part):
        if host is None:
            return None
        rows, width = tensor.shape[0], part.stop - part.start
        return host[: rows * width].view(rows, width)

    def fill(self, part, stream):
        if self._out is not None:
            self.hosts(part)[0].copy_(self._sent[:, part], non_blocking=True)
        self.filled.record(stream)

    def drain(self, part):
        if self._in is not None:
            self._received[:, part].copy_(self.hosts(part)[1], non_blocking=True)
