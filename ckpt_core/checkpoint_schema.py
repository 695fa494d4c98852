"""The schemas of `PyTorchCheckpoint`, marshmallow's and pydantic's; apart, so that only those who ask pay for them."""

# marshmallow's decorators are not annotated.
# pyright: reportUntypedFunctionDecorator=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from marshmallow import Schema, fields, post_load, pre_dump
from pydantic_core import CoreSchema, core_schema

if TYPE_CHECKING:
    from ckpt_core.checkpoint import PyTorchCheckpoint


def make_schema(cls: type[PyTorchCheckpoint], *, infer_missing: bool) -> type[Schema]:
    """Return the schema class whose objects are of `cls`."""

    class CheckpointSchema(Schema):
        hyperparameters = fields.Raw(allow_none=True)
        hyperparameter_types = fields.Raw(allow_none=True)
        url = fields.Raw(allow_none=True)
        run = fields.Raw(allow_none=True)
        step = fields.Raw(allow_none=True)
        digest = fields.Raw(allow_none=True)
        module = fields.Raw(allow_none=True)
        optimizer = fields.Raw(allow_none=True)

        @pre_dump
        def _to_dict(self, checkpoint: Any, **_: Any) -> Any:
            return checkpoint.to_dict() if isinstance(checkpoint, cls) else checkpoint

        @post_load
        def _from_dict(self, document: Any, **_: Any) -> Any:
            return cls.from_dict(document, infer_missing=infer_missing)

    return CheckpointSchema


def make_core_schema(cls: type[PyTorchCheckpoint]) -> CoreSchema:
    """Return the pydantic schema that takes a checkpoint or its reference, and writes the reference as JSON."""

    def read(value: Any) -> PyTorchCheckpoint:
        if isinstance(value, cls):
            return value
        return cls.from_json(value) if isinstance(value, (str, bytes)) else cls.from_dict(value)

    written = core_schema.plain_serializer_function_ser_schema(cls.to_dict, when_used="json")
    return core_schema.no_info_plain_validator_function(read, serialization=written)
