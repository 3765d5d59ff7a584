"""A ledger in the test process, to run stages without Ray."""

from segray.segmentation.stages.ledger import AttemptPlan, Ledger, LedgerClient


class LocalLedger(LedgerClient):
    """Calls a real ``Ledger`` directly instead of through an actor."""

    def __init__(self, stage: str, ledger: Ledger | None = None) -> None:
        super().__init__(stage, None)
        self.ledger = ledger or Ledger(num_predictors=1)

    def begin(self, fragment: int) -> AttemptPlan:
        return self.ledger.begin(self._stage, fragment)

    def record_image(self, fragment: int, attempt_plan: AttemptPlan, index: int | None) -> None:
        self.ledger.record_image(self._stage, fragment, attempt_plan.attempt, index)

    def end(self, fragment: int, attempt_plan: AttemptPlan) -> None:
        self.ledger.end(self._stage, fragment, attempt_plan.attempt)

    def start_predictor(self) -> None:
        self.ledger.start_predictor()
