"""A run's ledger in this process: stages can be tried without Ray."""

from segray.segmentation.stages.ledger import Ledger, LedgerClient, Orders


class LocalLedger(LedgerClient):
    """Calls the real ledger directly."""

    def __init__(self, stage: str, ledger: Ledger | None = None) -> None:
        super().__init__(stage, None)
        self.ledger = ledger or Ledger(num_predictors=1)

    def begin(self, fragment: int) -> Orders:
        return self.ledger.begin(self._stage, fragment)

    def enter(self, fragment: int, orders: Orders, index: int | None) -> None:
        self.ledger.enter(self._stage, fragment, orders.attempt, index)

    def end(self, fragment: int, orders: Orders) -> None:
        self.ledger.end(self._stage, fragment, orders.attempt)

    def start_predictor(self) -> None:
        self.ledger.start_predictor()
