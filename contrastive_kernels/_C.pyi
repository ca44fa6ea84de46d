"""The C++ extension. A panel's members are keywords, those of ``Panel`` and ``SearchPanel`` in csrc/include/api.h.

Addresses are integers, 0 is a null pointer, and what is left out is not wanted.
"""

from typing import TypedDict, type_check_only

from typing_extensions import Unpack

@type_check_only
class _Panel(TypedDict, total=False):
    term: int
    scores: int
    rows: int
    cols: int
    stride: int
    params: int
    exclude: int
    exclude_count: int
    first_column: int
    row_reference: int
    row_sum: int
    row_normalizer: int
    row_gain: int
    col_reference: int
    col_sum: int
    col_normalizer: int
    col_gain: int
    weights: int
    weights_dtype: int
    weights_stride: int
    dparams: int
    threads: int
    x: int
    y: int
    operands: int
    depth: int
    x_stride: int
    y_stride: int
    factor: int
    device: int
    stream: int
    scratch: int
    scratch_bytes: int

@type_check_only
class _SearchPanel(TypedDict, total=False):
    term: int
    scores: int
    rows: int
    cols: int
    stride: int
    params: int
    exclude: int
    exclude_count: int
    first_row: int
    first_column: int
    row_ids: int
    col_ids: int
    seed: int
    best: int
    best_column: int
    low: int
    high: int
    below: int
    above: int
    threads: int

def reduce_panel(**panel: Unpack[_Panel]) -> None: ...
def weight_panel(**panel: Unpack[_Panel]) -> None: ...
def search_panel(**panel: Unpack[_SearchPanel]) -> None: ...
def gumbel_array(seed: int, row: int, first_column: int, out: int, n: int, /) -> None: ...
def exp_array(x: int, out: int, n: int, /) -> None: ...
def instruction_set() -> str: ...
def set_instruction_set(name: str, /) -> None: ...
def cuda_reduce_panel(**panel: Unpack[_Panel]) -> None: ...
def cuda_weight_panel(**panel: Unpack[_Panel]) -> None: ...
def cuda_scratch_bytes(rows: int, cols: int, /) -> int: ...
def cuda_version() -> int: ...
def cuda_architectures() -> str: ...
def cuda_why_not(device: int, /) -> str: ...
def cuda_has_tensor_cores(device: int, /) -> bool: ...
