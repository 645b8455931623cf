"""Static block sizes of the Pallas forms: how many queries and keys a program holds at a time.

They are chosen by the on-chip memory they take, which `tests/kernels` adds up; measured ones may take their place.
"""

from typing import NamedTuple

from kernels.paged_attention.ragged import QUERY_BLOCK

# Rows of the smallest operand that a tensor core multiplies.
TENSOR_CORE_ROWS = 16


class GpuBlocks(NamedTuple):
    """Of one Triton program. All are powers of two."""

    queries: int  # rows x heads of a group, in a prompt chunk
    keys: int
    num_warps: int
    num_stages: int  # blocks of keys in flight

    def shared_bytes(self, head_dim: int, itemsize: int) -> int:
        """Shared memory: the keys and values in flight, the queries and the weights of one block."""
        kv = 2 * self.num_stages * self.keys * head_dim * itemsize
        return kv + self.queries * (head_dim + self.keys) * itemsize


# By bytes of one padded key: 16 KiB of keys a block, less where they are so small that the scores would not fit.
_GPU = {
    64: GpuBlocks(64, 64, num_warps=4, num_stages=3),
    128: GpuBlocks(64, 64, num_warps=4, num_stages=3),
    256: GpuBlocks(64, 64, num_warps=4, num_stages=2),
    512: GpuBlocks(32, 32, num_warps=4, num_stages=2),
    1024: GpuBlocks(32, 16, num_warps=4, num_stages=2),
}


def gpu_blocks(head_dim: int, itemsize: int) -> GpuBlocks:
    """For a head dimension padded to a power of two."""
    size = head_dim * itemsize
    return _GPU[min(max(size, min(_GPU)), max(_GPU))]


# Programs that keep every multiprocessor of a large GPU busy with several.
_DECODE_PROGRAMS = 1024


def decode_splits(sequences: int, kv_heads: int, key_blocks: int) -> int:
    """Into how many pieces the keys of one sequence are cut in a decode step of `sequences` rows whose block tables
    hold `key_blocks` blocks: a power of two, so that few sequences occupy the whole GPU too."""
    splits = 1
    while 2 * splits <= min(32, key_blocks) and splits * sequences * kv_heads < _DECODE_PROGRAMS:
        splits *= 2
    return splits


# Of a TPU's vector registers, for 32-bit elements.
LANES, SUBLANES = 128, 8
# Keys of a block, by page size at most: enough to hide the latency of a copy behind the arithmetic of one before.
_TPU_KEYS = 256
# What a kernel may take without asking for more, and half of the scalar memory.
_VMEM_BYTES, _SMEM_BYTES = 16 << 20, 512 << 10


def tpu_pages(page_size: int, table_pages: int) -> int:
    """Pages of one block of keys."""
    return max(1, min(_TPU_KEYS // page_size, table_pages))


class TpuMemory(NamedTuple):
    """On-chip memory of the larger of the two TPU kernels, the one for prompt chunks."""

    vmem_bytes: int
    smem_bytes: int

    def refuses(self) -> str:
        if self.vmem_bytes > _VMEM_BYTES:
            return f"the kernel needs {self.vmem_bytes} bytes of vector memory, expected at most {_VMEM_BYTES}"
        if self.smem_bytes > _SMEM_BYTES:
            return f"the block tables take {self.smem_bytes} bytes of scalar memory, expected at most {_SMEM_BYTES}"
        return ""


def tpu_memory(q, kv, batch, *, has_sinks: bool = True) -> TpuMemory:
    """Adds up the arrays that the TPU kernel declares, as tiles, and the scores of one head.

    Args:
      q, kv, batch: as of `paged_attention`; only shapes and dtypes are read.
    """
    heads, head_dim = q.shape[1:]
    kv_heads_2, width = kv.shape[3], -(-head_dim // LANES) * LANES
    items = batch.item_sequence.shape[0]
    rows = QUERY_BLOCK if items else max(1, SUBLANES * kv_heads_2 // (2 * heads))
    pages = tpu_pages(kv.shape[2], batch.block_tables.shape[1])
    keys = pages * kv.shape[2]
    queries = rows * heads
    buffers = 2 * keys * kv_heads_2 * width * kv.dtype.itemsize
    # Largest score, sum of weights, and the sinks, which the grid holds twice as it does every input.
    statistics = (2 + 2 * has_sinks) * queries * LANES * 4
    results = 3 * queries * width * 4  # rows as they come and go, gathered by head, weighted values
    scores = 2 * (2 * queries // kv_heads_2) * keys * 4
    integers = batch.block_tables.size + 3 * batch.kv_lens.shape[0] + 2 * items + 8
    return TpuMemory(buffers + statistics + results + scores, 4 * integers)
