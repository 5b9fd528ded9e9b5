"""Tests the compile gate's reading of machine code on machine code written by hand."""

import sass

# A loop over vectors, in which a jump table chooses between nothing and a call; out-of-line code that branches
# backward; a loop over single elements.
SCALE = """
.text.scale:
        /*0000*/                   MOV R20, RZ ;
.L_x_0:
        /*0010*/                   LDS.128 R4, [R2] ;
        /*0020*/                   LDS.128 R8, [R2+0x10] ;
        /*0030*/                   LDS R12, [R3] ;
        /*0040*/                   FMUL R4, R4.reuse, R12 ;
        /*0050*/                   LDS.128 R16, [R2+0x20] ;
        /*0060*/                   BRX R13 -0x70    (*"BRANCH_TARGETS .L_x_1,.L_x_2"*);
.L_x_1:
        /*0070*/                   LDS.U8 R5, [R3+0x4] ;
        /*0080*/                   CALL.REL.NOINC `($__internal_0_$__cuda_slowpath) ;
.L_x_2:
        /*0090*/              @!P0 BRA `(.L_x_4) ;
.L_x_3:
        /*00a0*/                   STG.E.128 desc[UR4][R14.64], R4 ;
        /*00b0*/                   ISETP.GE.AND P0, PT, R20, R21, PT ;
        /*00c0*/              @!P0 BRA `(.L_x_0) ;
.L_x_5:
        /*00d0*/                   LDS.U16 R22, [R3] ;
        /*00e0*/                   STG.E.U16 desc[UR4][R14.64], R22 ;
        /*00f0*/              @!P1 BRA `(.L_x_5) ;
        /*0100*/                   EXIT ;
.L_x_4:
        /*0110*/                   MOV R4, RZ ;
        /*0120*/                   BRA `(.L_x_3) ;
.L_x_6:
        /*0130*/                   BRA `(.L_x_6);
"""
# A loop around a loop. The inner one also branches back from its middle.
COPY = """
.text.copy:
.L_x_7:
        /*0000*/                   MOV R2, RZ ;
.L_x_8:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R4.64] ;
        /*0020*/               @P0 BRA `(.L_x_8) ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R3+0x10], desc[UR4][R4.64+0x10] ;
        /*0040*/                   BRA.U !UP0, `(.L_x_8) ;
        /*0050*/                   BRA !P1, `(.L_x_7) ;
        /*0060*/                   EXIT ;
"""


def loop(text: str) -> sass.Loop:
    (code,) = sass.read(text).values()
    (loop,) = sass.vector_loops(code)
    return loop


def test_functions_are_read_by_name():
    assert {name: len(code) for name, code in sass.read(SCALE + COPY).items()} == {"scale": 20, "copy": 7}


def test_a_turn_takes_the_shortest_way_and_its_body_is_all():
    scale = loop(SCALE)
    assert len(scale.body) == 12
    assert [one.name for one in scale.turn][5:8] == ["BRX", "BRA", "STG.E.128"]
    assert scale.accesses == {"LDS": 3, "STG": 1}
    assert scale.per_512_bytes == 10


def test_loads_in_flight_are_those_before_the_first_use():
    assert loop(SCALE).in_flight == 2
    # It is used only in the next turn.
    assert loop(SCALE.replace("R4.reuse", "RZ").replace("], R4", "], R30")).in_flight == 3
    # The last one of four registers.
    assert loop(SCALE.replace("FMUL R4, R4.reuse", "FMUL R4, R11")).in_flight == 2
    assert loop(SCALE.replace("[R3] ;", "[R7] ;", 1)).in_flight == 2
    assert loop(SCALE.replace("[R2+0x10]", "[R7]", 1)).in_flight == 1


def test_narrow_and_generic_accesses_are_found_in_the_whole_body():
    assert loop(SCALE).narrow == ["LDS.U8"]
    assert loop(SCALE.replace("LDS R12", "LD.E R12")).narrow == ["LD.E", "LDS.U8"]
    assert loop(SCALE.replace("LDS.U8", "LDS.U.U16")).narrow == ["LDS.U.U16"]
    assert loop(SCALE.replace("LDS.U8", "LDS.U.64")).narrow == []


def test_only_the_innermost_loop_counts_up_to_its_last_branch():
    copy = loop(COPY)
    assert (len(copy.body), len(copy.turn), copy.in_flight) == (4, 4, 2)


def test_a_row_has_the_columns():
    row = dict(zip(sass.COLUMNS, loop(SCALE).row(), strict=True))
    assert row["per 512 bytes"] == "10.0"
    assert (row["LDS128"], row["LDG128"], row["loads in flight"], row["narrow"]) == ("3", "0", "2", "LDS.U8")


def test_shared_memory_read_in_pieces_is_found():
    def pieces(text: str) -> list[str]:
        (code,) = sass.read(text).values()
        return sass.pieces(code, sass.vector_loops(code))

    assert pieces(SCALE) == ["LDS.U8 in loop 0", "bytes by LDS.U8"]
    assert pieces(SCALE.replace("LDS.U8", "LDS")) == []
    assert pieces(SCALE.replace("LDS.U8", "LD.E")) == ["LD.E in loop 0"]
    assert pieces(SCALE.replace("LDS.U8", "LDS").replace("LDS.128", "LDS.64")) == ["no LDS.128 in loop 0"]
    assert pieces(SCALE.replace("LDS.U8", "LDS").replace("LDS.U16", "LD.E.U8")) == ["bytes by LD.E.U8"]
    assert pieces(COPY) == []
