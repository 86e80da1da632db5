"""Reading PTX and amdgcn text."""

import pytest

from benchmarks.proof.assembly import bulk_loads, load_widths, main_loop, mma_kind


def test_load_widths():
    ptx = """
        @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        @%p1 ld.global.L1::evict_last.v2.b64 { %rd1, %rd2 }, [ %rd1 + 0 ];
        @%p2 ld.global.b16 { %rs1 }, [ %rd2 + 0 ];
        ld.shared.b16 %rs3, [%r2];
        ld.global.b64 %rd9, [%rd8];
        cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
        @%p1 cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4;
        cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}], [%r4];
    """
    assert load_widths(ptx, "sm_90") == {"2": 1, "4": 1, "8": 1, "16": 3}
    gcn = """
        buffer_load_dwordx4 v[2:5], v1, s[8:11], 0 offen
        global_load_dword v1, v[2:3], off
        buffer_load_ushort v7, v1, s[8:11], 0 offen
        global_load_short_d16_hi v1, v[2:3], off
        ds_read_b128 v[0:3], v4
    """
    assert load_widths(gcn, "gfx942") == {"2": 2, "4": 1, "16": 1}


def test_bulk_loads():
    load = "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}], [%r4];"
    assert bulk_loads(load + "\n" + load) == 2
    assert bulk_loads("ld.global.b16 {%rs1}, [%rd1];") == 0


@pytest.mark.parametrize(
    "instruction, kind",
    [
        ("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1,%r2}, %rd1, %rd2, p, 1, 1, 0, 0;", "wgmma SS"),
        ("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1,%r2}, {%r3,%r4}, %rd2, p, 1, 1, 0;", "wgmma RS"),
        ("tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1, %rd2, %r2, %p1;", "tcgen05"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};", "mma.sync"),
        ("v_mfma_f32_32x32x8_bf16_1k v[0:15], v[16:17], v[18:19], v[0:15]", "mfma"),
        ("fma.rn.f32 %f1, %f2, %f3, %f4;", "-"),
    ],
)
def test_mma_kind(instruction, kind):
    assert mma_kind("    " + instruction) == kind


PTX = """
$L__BB0_1:
    add.s32 %r1, %r1, 1;
$L__BB0_2:
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};
    // a comment
    add.s32 %r2, %r2, 1;
    setp.lt.s32 %p1, %r2, 8;
    @%p1 bra $L__BB0_2;
    @%p2 bra $L__BB0_1;
$L__BB0_3:
    add.s32 %r5, %r5, 1;
    add.s32 %r5, %r5, 2;
    add.s32 %r5, %r5, 3;
    add.s32 %r5, %r5, 4;
    add.s32 %r5, %r5, 5;
    @%p2 bra $L__BB0_3;
    bra $L__BB0_9;
$L__BB0_9:
    ret;
"""


def test_main_loop_is_the_innermost_that_multiplies():
    assert main_loop(PTX) == 4


def test_main_loop_of_a_kernel_without_products_is_its_longest():
    assert main_loop(PTX.replace("mma.sync", "foo.sync")) == 6
    assert main_loop("    ret;") == 0
