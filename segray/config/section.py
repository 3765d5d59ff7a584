"""The base class of all settings sections, and the value types that several of them share."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

ImageSide = Annotated[int, Field(ge=16, le=16_384)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A frozen group of settings that rejects unknown names, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
