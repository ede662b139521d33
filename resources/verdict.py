"""The decision whether a model may be served. Needs no Dagster."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """Whether one exact model may be served, and why."""

    model_digest: str
    test_accuracy: float
    threshold: float
    objections: tuple[str, ...] = ()
    """What else speaks against it: checks that failed or never ran. Any refuses the model, however accurate it is."""

    @property
    def is_accurate(self) -> bool:
        return self.test_accuracy >= self.threshold

    @property
    def passed(self) -> bool:
        return self.is_accurate and not self.objections

    @property
    def reason(self) -> str:
        relation = "reaches" if self.is_accurate else "is below"
        accuracy = (
            f"test accuracy {self.test_accuracy:.4f} of model {self.model_digest} {relation} "
            f"the threshold {self.threshold:.4f}"
        )
        return "; ".join([accuracy, *self.objections])
