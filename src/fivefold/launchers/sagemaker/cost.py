"""What a plan may cost at most: price of an instance × instances × longest time that it is paid for."""

from dataclasses import dataclass

from fivefold.errors import SettingsError
from fivefold.launchers.plan import Plan, Step
from fivefold.launchers.sagemaker.requests import options_of
from fivefold.recipe import SageMaker


@dataclass(frozen=True)
class Ceiling:
    """The most that a step may cost: `price` an hour and instance, for `hours`."""

    step: str
    instance: str
    count: int
    price: float
    hours: float

    @property
    def cost(self) -> float:
        return self.price * self.count * self.hours

    def __str__(self) -> str:
        return f"{self.step}: {self.count} × {self.instance} at {self.price:g} × {self.hours:g} h = {self.cost:.2f}"


def ceilings(plan: Plan) -> list[Ceiling]:
    """Of each step the most that it may cost; a warm pool's wait counts, a spot's discount does not."""
    return [_ceiling(step, options_of(plan.settings, step)) for step in plan.steps]


def check_cost(plan: Plan) -> list[Ceiling]:
    """The ceilings; a SettingsError where they sum to more than `sagemaker.max_cost`, or a price is not given for it."""
    found, most = ceilings(plan), plan.settings.sagemaker.max_cost
    if not most:
        return found
    unknown = next((each for each in found if not each.price), None)
    if unknown:
        raise SettingsError(
            f"sagemaker.max_cost={most:g} needs the price of {unknown.instance} for {unknown.step}: sagemaker.price=, "
            "for an instance and hour, or sagemaker.stages.STAGE.price="
        )
    total = sum(each.cost for each in found)
    if total > most:
        dearest = max(found, key=lambda each: each.cost)
        raise SettingsError(
            f"the plan may cost up to {total:.2f}, above sagemaker.max_cost={most:g}; the dearest of its {len(found)} "
            f"steps: {dearest}. Lower sagemaker.max_hours, take a cheaper instance, or raise sagemaker.max_cost"
        )
    return found


def in_words(found: list[Ceiling], most: float) -> str:
    """A line for the user: what the jobs may cost, as far as prices are known."""
    total, unpriced = sum(each.cost for each in found), sum(not each.price for each in found)
    limit = f", of {most:g} allowed" if most else ", no sagemaker.max_cost is set"
    if unpriced:
        return (
            f"what {unpriced} of {len(found)} jobs may cost is not known: give sagemaker.price and sagemaker.max_cost"
        )
    return f"{len(found)} jobs may cost up to {total:.2f} (price × longest runtime){limit}"


def _ceiling(step: Step, options: SageMaker) -> Ceiling:
    hours = options.max_hours + options.keep_alive_minutes / 60
    return Ceiling(step.name, options.instance_type, options.instance_count, options.price, hours)
