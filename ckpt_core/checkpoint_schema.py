"""The marshmallow schema of `PyTorchCheckpoint`; apart, since only those who ask for it pay for marshmallow."""

# marshmallow's decorators are not annotated.
# pyright: reportUntypedFunctionDecorator=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from marshmallow import Schema, fields, post_load, pre_dump

if TYPE_CHECKING:
    from ckpt_core.checkpoint import PyTorchCheckpoint


def make_schema(cls: type[PyTorchCheckpoint], *, infer_missing: bool) -> type[Schema]:
    """Return the schema class whose objects are of `cls`."""

    class CheckpointSchema(Schema):
        hyperparameters = fields.Raw(allow_none=True)
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
