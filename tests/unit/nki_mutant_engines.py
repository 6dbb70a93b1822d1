"""Wrong kernels for the rules of the engines, and sound ones beside them;
loaded by test_nki_mutants.py inside the interpreter.

Each mutant is the shortest kernel that breaks its rule and no other.
"""

import nki
import nki.isa as nisa
import nki.language as nl

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


# ---- the tensor engine -----------------------------------------------------------------------------------------


@mutant("matmul-operand-buffers")
def a_matmul_into_sbuf():
    nisa.nc_matmul(dst=sb(128, 128), stationary=sb(128, 128), moving=sb(128, 128))


@mutant("matmul-contraction")
def contractions_that_differ():
    nisa.nc_matmul(dst=ps(128, 128), stationary=sb(128, 128), moving=sb(64, 128))


@mutant("matmul-stationary-size")
def a_wide_stationary():
    nisa.nc_matmul(dst=ps(128, 128), stationary=sb(128, 129), moving=sb(128, 128))


@mutant("matmul-moving-size")
def a_long_moving_before_trn3():
    nisa.nc_matmul(dst=ps(128, 1024), stationary=sb(128, 128), moving=sb(128, 1024))


@sound(on="trn3")
def a_long_moving_on_trn3():
    nisa.nc_matmul(dst=ps(128, 1024), stationary=sb(128, 128), moving=sb(128, 1024))


@mutant("matmul-dst-shape")
def a_transposed_destination():
    nisa.nc_matmul(dst=ps(64, 32), stationary=sb(128, 32), moving=sb(128, 64))


@mutant("matmul-dst-bank")
def a_result_across_two_banks():
    nisa.nc_matmul(dst=ps(128, 1024)[:, 256:768], stationary=sb(128, 128), moving=sb(128, 512))


@mutant("matmul-dst-dtype")
def bf16_psum_before_trn3():
    nisa.nc_matmul(dst=ps(128, 128, dtype=BF16), stationary=sb(128, 128), moving=sb(128, 128))


@sound(on="trn3")
def bf16_psum_on_trn3():
    nisa.nc_matmul(dst=ps(128, 128, dtype=BF16), stationary=sb(128, 128), moving=sb(128, 128))


@mutant("matmul-dtypes")
def float32_with_bfloat16():
    nisa.nc_matmul(dst=ps(128, 128), stationary=sb(128, 128), moving=sb(128, 128, dtype=BF16))


@mutant("matmul-dtypes")
def an_integer_matmul():
    nisa.nc_matmul(dst=ps(128, 128), stationary=sb(128, 128, dtype=nl.int8), moving=sb(128, 128, dtype=nl.int8))


@mutant("matmul-fp8-mix", on="trn3")
def both_e4m3s():
    nisa.nc_matmul(
        dst=ps(128, 128), stationary=sb(128, 128, dtype=nl.float8_e4m3), moving=sb(128, 128, dtype=nl.float8_e4m3fn)
    )


@mutant("generation-lacks")
def ocp_fp8_before_trn3():
    tile = sb(128, 128, dtype=nl.float8_e5m2)
    nisa.nc_matmul(dst=ps(128, 128), stationary=tile.view(nl.float8_e4m3fn), moving=tile)


@mutant("generation-lacks", on="trn1")
def double_row_on_trn1():
    tile = sb(128, 2, 128, dtype=nl.float8_e5m2)
    nisa.nc_matmul(dst=ps(128, 128), stationary=tile, moving=tile, perf_mode=nisa.matmul_perf_mode.double_row)


@sound()
def double_row_on_trn2():
    tile = sb(128, 2, 128, dtype=nl.float8_e5m2)
    nisa.nc_matmul(dst=ps(128, 128), stationary=tile, moving=tile, perf_mode=nisa.matmul_perf_mode.double_row)


@mutant("matmul-double-row")
def double_row_of_bfloat16():
    tile = sb(128, 2, 128, dtype=BF16)
    nisa.nc_matmul(dst=ps(128, 128), stationary=tile, moving=tile, perf_mode=nisa.matmul_perf_mode.double_row)


@mutant("matmul-tiling")
def a_tile_position_without_size():
    nisa.nc_matmul(dst=ps(32, 32), stationary=sb(64, 32), moving=sb(64, 32), tile_position=(64, 0))


@mutant("psum-accumulate-first")
def accumulation_that_nothing_started():
    nisa.nc_matmul(dst=ps(128, 128), stationary=sb(128, 128), moving=sb(128, 128), accumulate=True)


@mutant("psum-foreign-accumulate")
def accumulation_onto_a_memset():
    product = ps(128, 128)
    nisa.memset(dst=product, value=0.0)
    nisa.nc_matmul(dst=product, stationary=sb(128, 128), moving=sb(128, 128))


@sound(on="trn3")
def accumulation_onto_a_memset_on_trn3():
    product = ps(128, 128)
    nisa.memset(dst=product, value=0.0)
    nisa.nc_matmul(dst=product, stationary=sb(128, 128), moving=sb(128, 128))


@mutant("psum-partial-overlap")
def a_second_matmul_over_half_a_region():
    product = ps(128, 128)
    nisa.nc_matmul(dst=product[:, 0:64], stationary=sb(128, 128), moving=sb(128, 64))
    nisa.nc_matmul(dst=product, stationary=sb(128, 128), moving=sb(128, 128))


@sound()
def two_regions_of_one_tile():
    product = ps(128, 128)
    nisa.nc_matmul(dst=product[:, 0:64], stationary=sb(128, 128), moving=sb(128, 64))
    nisa.nc_matmul(dst=product[:, 64:128], stationary=sb(128, 128), moving=sb(128, 64))


@mutant("transpose-shape")
def a_transpose_that_keeps_its_shape():
    nisa.nc_transpose(dst=ps(64, 32), data=sb(64, 32))


@mutant("transpose-dtype")
def a_transpose_that_casts():
    nisa.nc_transpose(dst=ps(64, 128, dtype=F32), data=sb(128, 64, dtype=BF16))


@mutant("transpose-buffers")
def a_large_transpose_into_sbuf():
    nisa.nc_transpose(dst=sb(64, 128), data=sb(128, 64))


@mutant("transpose-nan", on="trn1")
def a_transposed_infinity_on_trn1():
    tile = sb(128, 64)
    nisa.memset(dst=tile, value=float("inf"))
    nisa.nc_transpose(dst=ps(64, 128), data=tile)


@sound()
def a_transposed_infinity_on_trn2():
    tile = sb(128, 64)
    nisa.memset(dst=tile, value=float("inf"))
    nisa.nc_transpose(dst=ps(64, 128), data=tile)


# ---- vector and scalar engines ---------------------------------------------------------------------------------


@mutant("alu-op")
def an_operator_by_name():
    nisa.tensor_tensor(dst=sb(128, 4), data1=sb(128, 4), data2=sb(128, 4), op="add")


@mutant("alu-op")
def an_activation_as_vector_operator():
    nisa.tensor_scalar(dst=sb(128, 4), data=sb(128, 4), op0=nl.exp, operand0=None)


@mutant("alu-op-kinds")
def a_shift_then_a_sum():
    tile = sb(128, 4, dtype=nl.int32)
    nisa.tensor_scalar(dst=tile, data=tile, op0=nl.left_shift, operand0=1, op1=nl.add, operand1=1.0)


@mutant("bitvec-integer")
def a_shift_of_floats():
    nisa.tensor_scalar(dst=sb(128, 4), data=sb(128, 4), op0=nl.left_shift, operand0=1)


@mutant("unary-operand")
def an_absolute_value_with_an_operand():
    nisa.tensor_scalar(dst=sb(128, 4), data=sb(128, 4), op0=nl.abs, operand0=3.0)


@mutant("reduce-op")
def a_reduction_by_power():
    nisa.tensor_reduce(dst=sb(128, 1), op=nl.power, data=sb(128, 4), axis=1)


@mutant("reduce-axis")
def a_reduction_over_partitions():
    nisa.tensor_reduce(dst=sb(1, 4), op=nl.add, data=sb(128, 4), axis=0)


@mutant("reduce-axis")
def a_reduction_that_leaves_the_last_dimension():
    nisa.tensor_reduce(dst=sb(128, 4), op=nl.add, data=sb(128, 3, 4), axis=1)


@mutant("both-in-psum")
def two_inputs_in_psum():
    tile = nl.zeros((128, 4), dtype=F32, buffer=nl.psum)
    nisa.tensor_tensor(dst=sb(128, 4), data1=tile, data2=tile, op=nl.add)


@mutant("operand-vector")
def a_row_as_operand():
    nisa.tensor_scalar(dst=sb(128, 4), data=sb(128, 4), op0=nl.multiply, operand0=sb(1, 4))


@mutant("operand-float32")
def a_bfloat16_scale():
    nisa.activation(dst=sb(128, 4), op=nl.exp, data=sb(128, 4), scale=sb(128, 1, dtype=BF16))


@mutant("scalar-engine-ops")
def a_maximum_on_the_scalar_engine():
    nisa.tensor_scalar(dst=sb(128, 4), data=sb(128, 4), op0=nl.maximum, operand0=0.0, engine=nisa.engine.scalar)


@mutant("activation-op")
def an_activation_by_add():
    nisa.activation(dst=sb(128, 4), op=nl.add, data=sb(128, 4))


@mutant("activation-range")
def a_root_of_zero():
    nisa.activation(dst=sb(128, 4), op=nl.sqrt, data=sb(128, 4), scale=0.0)


@mutant("activation-range")
def a_sine_of_four():
    nisa.activation(dst=sb(128, 4), op=nl.sin, data=sb(128, 4), scale=4.0)


@mutant("activation-bias", on="trn1")
def a_number_as_bias_on_trn1():
    nisa.activation(dst=sb(128, 4), op=nl.exp, data=sb(128, 4), bias=1.0)


@sound()
def a_number_as_bias_on_trn2():
    nisa.activation(dst=sb(128, 4), op=nl.exp, data=sb(128, 4), bias=1.0)


@mutant("activation-reduce")
def a_maximum_in_the_scalar_registers():
    nisa.activation(
        dst=sb(128, 4),
        op=nl.exp,
        data=sb(128, 4),
        reduce_op=nl.maximum,
        reduce_res=sb(128, 1),
        reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )


@mutant("reduce-registers")
def registers_that_were_never_reset():
    nisa.activation(
        dst=sb(128, 4),
        op=nl.exp,
        data=sb(128, 4),
        reduce_op=nl.add,
        reduce_res=sb(128, 1),
        reduce_cmd=nisa.reduce_cmd.reduce,
    )


@mutant("bn-size")
def statistics_of_513_elements():
    nisa.bn_stats(dst=sb(128, 6), data=sb(128, 513))


@mutant("generation-lacks")
def exponential_before_trn3():
    nisa.exponential(dst=sb(128, 4), src=sb(128, 4))


@mutant("generation-lacks")
def mx_before_trn3():
    nisa.quantize_mx(
        dst=nl.ndarray((128, 16), dtype=nl.float8_e5m2_x4, buffer=nl.sbuf),
        src=sb(128, 64, dtype=BF16),
        dst_scale=sb(128, 16, dtype=nl.uint8),
    )


@mutant("mx-layout", on="trn3")
def mx_on_40_partitions():
    nisa.quantize_mx(
        dst=nl.ndarray((40, 16), dtype=nl.float8_e5m2_x4, buffer=nl.sbuf),
        src=sb(40, 64, dtype=BF16),
        dst_scale=sb(40, 16, dtype=nl.uint8),
    )


@mutant("mx-dtypes", on="trn3")
def mx_of_float32():
    nisa.quantize_mx(
        dst=nl.ndarray((128, 16), dtype=nl.float8_e5m2_x4, buffer=nl.sbuf),
        src=sb(128, 64),
        dst_scale=sb(128, 16, dtype=nl.uint8),
    )
