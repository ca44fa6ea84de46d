"""The C++ extension. A panel's members are keywords, named in csrc/include/members.h.

Addresses are integers, 0 is a null pointer, and what is left out is not wanted.
"""

def reduce_panel(**panel: int) -> None: ...
def weight_panel(**panel: int) -> None: ...
def search_panel(**panel: int) -> None: ...
def gumbel_array(seed: int, row: int, first_column: int, out: int, n: int, /) -> None: ...
def exp_array(x: int, out: int, n: int, /) -> None: ...
def softmax_matrix(
    scores: int,
    weights: int,
    rows: int,
    cols: int,
    diagonal: int | None,
    columns: int,
    columns_count: int,
    col_bias: int,
    positives: int,
    offset: int | None,
    scale: float,
    bias: float,
    gain: int,
    share: float,
    both: bool,
    symmetric: bool,
    out: int,
    threads: int,
    /,
) -> None: ...
def weighted_matrix(
    term: int,
    scores: int,
    weights: int,
    rows: int,
    cols: int,
    diagonal: int | None,
    columns: int,
    columns_count: int,
    col_bias: int,
    positives: int,
    offset: int | None,
    scale: float,
    bias: float,
    row_normalizer: int,
    row_gain: int,
    col_normalizer: int,
    col_gain: int,
    share: float,
    relative: bool,
    row_state: int,
    col_state: int,
    dots: int,
    out: int,
    threads: int,
    /,
) -> None: ...
def instruction_set() -> str: ...
def set_instruction_set(name: str, /) -> None: ...
def cuda_reduce_panel(**panel: int) -> None: ...
def cuda_weight_panel(**panel: int) -> None: ...
def cuda_scratch_bytes(rows: int, cols: int, /) -> int: ...
def cuda_version() -> int: ...
def cuda_architectures() -> str: ...
def cuda_why_not(device: int, /) -> str: ...
def cuda_has_tensor_cores(device: int, /) -> bool: ...
