"""The contract of all architectures, for the smallest member of every family of timm, and its table in the docs."""

import pytest

from tests.models.timm_families import ARCHITECTURES, SIZE, describe_fit, list_families, load_table, require_contract

TABLE = load_table()
# A U-Net or a DPT for each way in which an encoder's input size is found.
RUN = [("unet", "convnext"), ("unet", "selecsls"), ("unet", "byoanet"), ("unet", "swin_transformer"), ("unet", "hiera")]
RUN += [("unet", "maxxvit"), ("unet", "gcvit"), ("dpt", "beit"), ("dpt", "vision_transformer_sam"), ("dpt", "eva")]


def test_the_table_has_every_family_of_timm() -> None:
    assert list(TABLE) == list_families()  # Otherwise: make encoders


@pytest.mark.parametrize(("arch", "encoder"), [("unet", "tu-test_resnet"), ("dpt", "tu-test_vit")])
def test_a_small_encoder_accepts_any_size(arch: str, encoder: str) -> None:
    assert describe_fit(arch, encoder) == "any"
    require_contract(arch, encoder, (65, 97))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_smallest_member_of_every_family_accepts_the_sizes_in_the_table(arch: str) -> None:
    """On the meta device; ``make encoders`` has also run each network."""
    assert {family: describe_fit(arch, row["encoder"]) for family, row in TABLE.items()} == {
        family: row[arch] for family, row in TABLE.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "family"), RUN)
def test_a_family_can_be_trained_at_the_size_in_the_table(arch: str, family: str) -> None:
    require_contract(arch, TABLE[family]["encoder"], SIZE)
