"""Wrong kernels for the rules of tiles, of data movement and of a kernel's source;
loaded by test_nki_mutants.py inside the interpreter.

Each mutant is the shortest kernel that breaks its rule and no other.
"""

import nki
import nki.isa as nisa
import nki.language as nl
import numpy as np

X = np.ones((128, 512), np.float32)
F32, BF16 = nl.float32, nl.bfloat16
MUTANTS = []
SOUND = []


def mutant(rule, *args, on="trn2"):
    def keep(function):
        MUTANTS.append((rule, on, nki.jit(function), args))
        return function

    return keep


def sound(*args, on="trn2"):
    def keep(function):
        SOUND.append((on, nki.jit(function), args))
        return function

    return keep


def sb(rows, columns, more=0, dtype=nl.float32):
    shape = (rows, columns, more) if more else (rows, columns)
    tile = nl.ndarray(shape, dtype=dtype, buffer=nl.sbuf)
    nisa.memset(dst=tile, value=1)
    return tile


def ps(rows, columns, dtype=nl.float32):
    return nl.ndarray((rows, columns), dtype=dtype, buffer=nl.psum)


def hbm(rows, columns, dtype=nl.float32):
    return nl.ndarray((rows, columns), dtype=dtype, buffer=nl.shared_hbm)


# ---- tiles and memory ------------------------------------------------------------------------------------------


@mutant("partitions-128")
def too_many_partitions():
    nl.ndarray((129, 4), dtype=F32, buffer=nl.sbuf)


@mutant("empty-shape")
def a_dimension_of_zero():
    nl.ndarray((128, 0), dtype=F32, buffer=nl.sbuf)


@mutant("tile-2d")
def a_vector_on_chip():
    nl.ndarray((128,), dtype=F32, buffer=nl.sbuf)


@mutant("sbuf-capacity", on="trn1")
def a_tile_that_only_trn2_holds():
    nl.ndarray((128, 50000), dtype=F32, buffer=nl.sbuf)


@mutant("sbuf-capacity")
def many_tiles_kept_alive():
    kept = []
    for _ in range(15):
        kept.append(nl.ndarray((128, 4096), dtype=F32, buffer=nl.sbuf))


@mutant("psum-capacity")
def nine_banks():
    kept = []
    for _ in range(9):
        kept.append(ps(128, 512))


@mutant("buffer-not-string")
def a_buffer_by_name():
    nl.ndarray((128, 4), dtype=F32, buffer="sbuf")


@mutant("dtype-not-nki")
def a_numpy_dtype():
    nl.ndarray((128, 4), dtype=np.float32, buffer=nl.sbuf)


@mutant("host-dtype", X.astype(np.float64))
def a_float64_argument(x):
    nl.load(x)


@mutant("manual-address")
def an_address():
    nl.ndarray((128, 4), dtype=F32, buffer=nl.sbuf, address=(0, 0))


@mutant("uninitialised-read")
def a_tile_read_before_it_is_written():
    nisa.tensor_copy(dst=sb(128, 4), src=nl.ndarray((128, 4), dtype=F32, buffer=nl.sbuf))


@mutant("uninitialised-read", X)
def a_tail_that_was_not_loaded(x):
    tile = nl.ndarray((128, 512), dtype=F32, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile[0:100, :], src=x[0:100, :])
    nisa.activation(dst=sb(128, 512), op=nl.exp, data=tile)


@mutant("start-partition")
def an_access_from_partition_16():
    nisa.memset(dst=sb(128, 4)[16:32, :], value=0.0)


@mutant("start-partition")
def sixty_four_partitions_from_32():
    nisa.memset(dst=sb(128, 4)[32:96, :], value=0.0)


# ---- views -----------------------------------------------------------------------------------------------------


@mutant("index-out-of-range", X)
def a_slice_past_the_end(x):
    nl.load(x[100:200, :])


@mutant("partition-dim-fixed")
def a_permuted_partition():
    sb(128, 4).permute((1, 0))


@mutant("partition-dim-fixed")
def a_reshape_across_partitions():
    sb(128, 4).reshape((64, 8))


@mutant("partition-dim-fixed")
def a_broadcast_of_the_partition():
    sb(1, 4).broadcast(0, 128)


@mutant("reshape-size")
def a_reshape_that_loses_elements():
    sb(128, 4).reshape((128, 3))


@mutant("reshape-layout")
def a_reshape_of_a_strided_view():
    sb(128, 8, 8)[:, :, 0:4].reshape((128, 32))


@mutant("broadcast-size-1")
def a_broadcast_of_four():
    sb(128, 4).broadcast(1, 8)


@mutant("permutation")
def a_dimension_named_twice():
    sb(128, 4, 4).permute((0, 1, 1))


@mutant("view-dtype")
def half_an_element():
    sb(128, 3, dtype=BF16).view(F32)


@mutant("ap-partition-stride")
def every_other_partition():
    sb(16, 32).ap(pattern=[[64, 8], [1, 32]])


@mutant("ap-out-of-bounds")
def a_pattern_past_the_end():
    sb(16, 32).ap(pattern=[[32, 16], [1, 33]])


@mutant("dynamic-index")
def a_tile_as_index():
    sb(128, 4)[sb(1, 1, dtype=nl.int32)]


@mutant("value-at-trace-time")
def a_branch_on_a_value():
    if sb(1, 1):
        sb(1, 1)


@mutant("tile-arithmetic")
def a_python_sum():
    sb(128, 4) + sb(128, 4)


# ---- data movement ---------------------------------------------------------------------------------------------


@mutant("dma-no-psum")
def dma_out_of_psum():
    product = ps(128, 128)
    nisa.nc_matmul(dst=product, stationary=sb(128, 128), moving=sb(128, 128))
    nisa.dma_copy(dst=hbm(128, 128), src=product)


@mutant("dma-size", X)
def dma_into_a_smaller_tile(x):
    nisa.dma_copy(dst=sb(128, 500), src=x)


@mutant("dma-hwdge-cast", X)
def a_cast_by_hardware_dma(x):
    nisa.dma_copy(dst=sb(128, 512, dtype=BF16), src=x, dge_mode=nisa.dge_mode.hwdge)


@mutant("generation-lacks", X, on="trn1")
def hardware_dma_on_trn1(x):
    nisa.dma_copy(dst=sb(128, 512), src=x, dge_mode=nisa.dge_mode.hwdge)


@mutant("enum-not-int", X)
def an_enum_by_number(x):
    nisa.dma_copy(dst=sb(128, 512), src=x, dge_mode=2)


@mutant("on-chip-only", X)
def an_engine_on_hbm(x):
    nisa.tensor_copy(dst=sb(128, 512), src=x)


@mutant("sbuf-only")
def an_iota_into_psum():
    nisa.iota(dst=ps(128, 4, dtype=nl.int32), pattern=[[1, 4]])


@mutant("tile-shape")
def operands_of_other_sizes():
    nisa.tensor_tensor(dst=sb(128, 4), data1=sb(128, 4), data2=sb(128, 1), op=nl.add)


@mutant("gpsimd-no-psum")
def gpsimd_reads_psum():
    nisa.tensor_copy(dst=sb(128, 4), src=nl.zeros((128, 4), dtype=F32, buffer=nl.psum), engine=nisa.engine.gpsimd)


@mutant("gpsimd-no-psum")
def a_power_from_psum():
    nisa.tensor_tensor(
        dst=sb(128, 4), data1=nl.zeros((128, 4), dtype=F32, buffer=nl.psum), data2=sb(128, 4), op=nl.power
    )


@mutant("engine-unsupported")
def memset_on_the_tensor_engine():
    nisa.memset(dst=sb(128, 4), value=0.0, engine=nisa.engine.tensor)


@mutant("memset-dtype")
def a_fraction_into_integers():
    nisa.memset(dst=sb(128, 4, dtype=nl.int32), value=2.0)


@mutant("memset-dtype", on="trn3")
def ones_into_packed_elements():
    nisa.memset(dst=nl.ndarray((128, 4), dtype=nl.float8_e4m3fn_x4, buffer=nl.sbuf), value=1)


@mutant("iota-pattern")
def a_pattern_of_another_size():
    nisa.iota(dst=sb(128, 4, dtype=nl.int32), pattern=[[1, 5]])


@mutant("compare-op")
def a_predicate_that_adds():
    tile = sb(128, 4)
    nisa.affine_select(
        dst=tile, pattern=[[1, 4]], channel_multiplier=1, on_true_tile=tile, on_false_value=0.0, cmp_op=nl.add
    )


@mutant("predicate-dtype")
def a_float_predicate():
    nisa.tensor_copy_predicated(dst=sb(128, 4), src=sb(128, 4), predicate=sb(128, 4))


# ---- kernels and their source ----------------------------------------------------------------------------------


@mutant("output-shared-hbm")
def a_returned_sbuf_tile():
    return sb(128, 4)


@mutant("output-not-written", X)
def an_output_with_a_hole(x):
    out = hbm(128, 512)
    nisa.dma_copy(dst=out[0:127, :], src=x[0:127, :])
    return out


@mutant("list-argument", X, [1, 2])
def a_list_argument(x, sizes):
    return None


@mutant("list-argument", X)
def a_list_default(x, sizes=[1, 2]):  # noqa: B006
    return None


@mutant("unhashable-argument", X, {"a": 1})
def a_dictionary_argument(x, options):
    return None


@mutant("keyword-only", X)
def a_keyword_only_parameter(x, *, flag=True):
    return None


@mutant("is-operator", X)
def a_comparison_by_identity(x, flag=None):
    if flag is None:
        flag = 1


@mutant("python-subset", X)
def a_try_statement(x):
    try:
        nl.load(x)
    except ValueError:
        nl.load(x)


@mutant("python-subset", X)
def a_lambda(x):
    scale = lambda y: y  # noqa: E731
    scale(1)


def helper_with_a_comprehension(x):
    return [i + 1 for i in range(4)]


@mutant("python-subset", X)
def a_comprehension_in_a_helper(x):
    helper_with_a_comprehension(x)


@mutant("dict-keys", X)
def a_dictionary_by_number(x):
    sizes = {1: 2}
    return sizes[1]


@mutant("class-base", X)
def a_plain_class(x):
    class Plain:
        pass

    Plain()


@mutant("neuronxcc-namespace", X)
def the_old_namespace(x):
    import neuronxcc.nki  # noqa: F401


@mutant("not-in-subset")
def a_documented_instruction_outside_the_subset():
    nisa.max8(dst=sb(128, 8), src=sb(128, 16))


@mutant("unknown-name")
def an_instruction_that_does_not_exist():
    nisa.tensor_product(dst=sb(128, 8))


@mutant("unknown-parameter")
def a_parameter_that_does_not_exist():
    nisa.tensor_copy(dst=sb(128, 8), source=sb(128, 8))


@mutant("unknown-parameter")
def a_destination_left_out():
    nisa.reciprocal(data=sb(128, 8))
