"""A ledger in the test process, to run stages without Ray."""

from typing import Any

from segray.segmentation.stages.ledger import Ledger
from segray.segmentation.stages.ledger_client import LedgerClient


class LocalLedger(LedgerClient):
    """Calls a real ``Ledger`` directly instead of through an actor."""

    def __init__(self, stage: str, ledger: Ledger | None = None) -> None:
        super().__init__(stage, None)
        self.ledger = ledger or Ledger(num_predictors=1, image_timeout_s=300)

    def _call(self, method: str, *arguments: Any) -> Any:
        return getattr(self.ledger, method)(*arguments)
