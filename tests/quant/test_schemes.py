import pytest

from quant.formats import IntegerFormat
from quant.layers import Layer
from quant.schemes import Scheme, SchemeError, parse_scheme, parse_schemes


@pytest.mark.parametrize(
    ("text", "name", "spelled"),
    [
        ("w4", "w4", "w4-channel-sym-float16-mse_clip"),
        (" W4-Channel ", "w4", "w4-channel-sym-float16-mse_clip"),
        ("w4-channel-sym-float16-mse_clip", "w4", "w4-channel-sym-float16-mse_clip"),
        ("w2-tensor-asym", "w2-tensor-asym", "w2-tensor-asym-float16-mse_clip"),
        ("rtn-asym-w3-bfloat16-g7", "w3-g7-asym-bfloat16-rtn", "w3-g7-asym-bfloat16-rtn"),
        ("w8-float32", "w8-float32", "w8-channel-sym-float32-mse_clip"),
        ("fp8", "fp8", "fp8-channel-float32-mse_clip"),
        ("fp8-e5m2-tensor-rtn", "fp8-e5m2-tensor-rtn", "fp8-e5m2-tensor-float32-rtn"),
        ("fp4-g16", "fp4-g16", "fp4-g16-float16-mse_clip"),
        ("nf4-g64-float32", "nf4", "nf4-g64-float32-mse_clip"),
        ("nf4-channel", "nf4-channel", "nf4-channel-float32-mse_clip"),
        ("bf16", "bf16", "bf16-mse_clip"),
        ("rtn-mxfp4", "mxfp4-rtn", "mxfp4-rtn"),
        ("nvfp4", "nvfp4", "nvfp4-mse_clip"),
        ("Q4_K", "q4_k", "q4_k-mse_clip"),
        ("aint8-w8", "w8-aint8", "w8-channel-sym-float16-mse_clip-aint8"),
        ("w4-aint4-rtn-g128", "w4-g128-rtn-aint4", "w4-g128-sym-float16-rtn-aint4"),
        ("fp8-afp8s", "fp8-afp8s", "fp8-channel-float32-mse_clip-afp8s"),
        ("afp8-fp8-e5m2", "fp8-e5m2-afp8", "fp8-e5m2-channel-float32-mse_clip-afp8"),
        ("amxfp8-mxfp8", "mxfp8-amxfp8", "mxfp8-mse_clip-amxfp8"),
        ("nvfp4-anvfp4s", "nvfp4-anvfp4s", "nvfp4-mse_clip-anvfp4s"),
    ],
)
def test_one_canonical_name_and_one_full_spelling(text, name, spelled):
    scheme = parse_scheme(text)
    assert (scheme.name, scheme.spelled) == (name, spelled)
    assert parse_scheme(name) == parse_scheme(spelled) == scheme


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w4a8", "activations as a part of their own. Got 'w4a8'. Use 'w4-aint8'"),
        ("w4-aint6", "unknown part 'aint6'. Drop or correct it; activations are int8, int8s, int4"),
        ("w4-amxfp8s", "unknown part 'amxfp8s'"),
        ("w4-aint8-afp8", "must name its activations once. Got 'aint8' and 'afp8'"),
        ("aint8", "must be spelled w<bits>"),
        ("w1", "Weight bits must be 2 to 8. Got 1"),
        ("w9", "Weight bits must be 2 to 8. Got 9"),
        ("w16", "Weight bits must be 2 to 8"),
        ("w4-g0", "Group size must be at least 1. Got 0"),
        ("w4-w5", "must name its bits once"),
        ("w4-g32-channel", "must name its granularity once"),
        ("w4-rtn-mse_clip", "must name its quantizer once"),
        ("w4-nosuch", "unknown part 'nosuch'"),
        ("w4-", "unknown part ''"),
        ("int4", "must be spelled w<bits>"),
        ("fp9", "must be spelled w<bits>"),
        ("fp8-fp4", "must name its number type once. Got 'fp8' and 'fp4'"),
        ("nf4-g64-tensor", "must name its granularity once"),
        ("nf4-float16-float32", "must name its scale type once"),
        ("fp8-g0", "Group size must be at least 1. Got 0"),
        ("bf16-fp16", "must name its format once"),
        ("mxfp4-mxfp8", "must name its format once"),
        ("q4_k-q6_k", "must name its format once"),
        ("q7_k", "must be spelled w<bits>"),
        ("mxfp4-g32", "unknown part 'g32'"),
        ("", "short text"),
        ("w4" + "-sym" * 50, "short text"),
        (4, "short text"),
    ],
)
def test_errors_say_what_is_wrong_and_what_is_offered(text, message):
    with pytest.raises(SchemeError) as raised:
        parse_scheme(text)
    assert message in str(raised.value)


def test_the_whole_scheme_is_in_the_message():
    with pytest.raises(SchemeError, match="In scheme 'w4-g32-g64'"):
        parse_scheme("w4-g32-g64")


def test_menus_keep_their_order_and_hold_everything_once():
    assert [scheme.name for scheme in parse_schemes("w4, w2,w8-tensor")] == ["w4", "w2", "w8-tensor"]
    assert parse_schemes(["w4", "w2"]) == parse_schemes("w4,w2")
    with pytest.raises(SchemeError, match="Got w4 more than once"):
        parse_schemes("w4,w4-channel")
    with pytest.raises(SchemeError, match="at least one scheme"):
        parse_schemes(" , ")


def test_a_scheme_needs_a_listed_quantizer():
    with pytest.raises(
        SchemeError, match="Quantizer must be one of adaquant, .*, rtn, smoothquant. Got 'none'"
    ):
        Scheme(IntegerFormat(4), "none")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"granularity": "row"}, "Granularity must be"),
        ({"granularity": "group"}, "Group size must be given for groups"),
        ({"group_size": 32}, "Group size must be given for groups"),
        ({"scale_type": "float8"}, "Scale type must be one of"),
    ],
)
def test_formats_check_their_fields(fields, message):
    with pytest.raises(SchemeError, match=message):
        IntegerFormat(4, **fields)


def test_as_json_names_everything_a_score_depends_on():
    assert parse_scheme("w3-g64").as_json() == {
        "name": "w3-g64",
        "spelled": "w3-g64-sym-float16-mse_clip",
        "weight_bits": 3,
        "quantizer": "mse_clip",
        "quantizer_version": 1,
        "activation": None,
    }


def test_storage_counts_what_a_quantizer_adds():
    scheme = parse_scheme("w3-lorc2")
    assert scheme.adds
    assert not parse_scheme("w3").adds
    assert scheme.storage((5, 7)).added_bits == 16 * 2 * (5 + 7)
    assert scheme.storage((5, 7)).bytes == IntegerFormat(3).storage((5, 7)).bytes + 2 * 2 * 12
    assert scheme.storage((5, 7)).bits == IntegerFormat(3).storage((5, 7)).bits + 16 * 2 * 12


@pytest.mark.parametrize(
    ("text", "name", "spelled"),
    [
        ("lorc8-w3", "w3-lorc8", "w3-channel-sym-float16-mse_clip-lorc8"),
        ("w3-mse_clip-lorc8", "w3-lorc8", "w3-channel-sym-float16-mse_clip-lorc8"),
        ("w3-lorc16-gptq-g32", "w3-g32-gptq-lorc16", "w3-g32-sym-float16-gptq-lorc16"),
        ("nf4-lorc4-aint8-rtn", "nf4-rtn-lorc4-aint8", "nf4-g64-float32-rtn-lorc4-aint8"),
    ],
)
def test_an_adjusting_quantizer_has_another_one_round(text, name, spelled):
    scheme = parse_scheme(text)
    assert (scheme.name, scheme.spelled) == (name, spelled)
    assert parse_scheme(spelled) == scheme == parse_scheme(name)
    assert set(scheme.quantizers) == {scheme.base, "lorc"}
    assert scheme.needs_inputs == ("gptq" in name)
    assert scheme.as_json()["base"] == scheme.base


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w3-lorc", "Quantizer must be spelled lorc<rank>"),
        ("w3-lorc0", "unknown part 'lorc0'"),
        ("w3-lorc08", "unknown part 'lorc08'"),
        ("w3-rtn8", "Quantizer must be spelled rtn,"),
        ("w3-lorc4-lorc8", "must name its quantizer once"),
        ("bf16-lorc4", "Quantizer must support the format family 'plain'. Got 'lorc'"),
    ],
)
def test_adjusting_quantizers_are_spelled_with_their_number(text, message):
    with pytest.raises(SchemeError) as raised:
        parse_scheme(text)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantizer": "lorc", "parameter": 4}, "A base quantizer must be given"),
        ({"quantizer": "rtn", "base": "gptq"}, "A base quantizer must be given"),
        (
            {"quantizer": "lorc", "parameter": 4, "base": "lorc"},
            "Scheme must name one of awq, lorc, smoothquant at most",
        ),
        ({"quantizer": "lorc", "parameter": 4, "base": "none"}, "Quantizer must be one of"),
    ],
)
def test_schemes_check_who_rounds(fields, message):
    with pytest.raises(SchemeError, match=message):
        Scheme(IntegerFormat(4), **fields)


def test_factors_must_be_thinner_than_the_matrix():
    layer = Layer("fc", "linear", (8, 20), (8, 20), 160, None, "other", (), "float32")
    assert parse_scheme("w3-lorc7").refuses(layer) is None
    assert parse_scheme("w3-lorc8").refuses(layer) == (
        "factors of rank 8 must be thinner than the matrix 8 x 20; use a lower rank"
    )
