"""What can go wrong between us and a cluster, as a person should read it."""


class KubernetesError(Exception):
    """Base of the errors of everything that works with a cluster. `permanent`: trying again unchanged fails again."""

    permanent = False


class SettingsError(KubernetesError, ValueError):
    """A setting that the API server or an operator would refuse, or would take and then never act on."""

    permanent = True


class ApiUnavailableError(KubernetesError):
    """No answer, or an answer that says to try again later. Whether a write took effect is unknown."""


class ApiRefusedError(KubernetesError):
    """The API server understood the request and will not do it: no permission, no such kind, an invalid object."""

    permanent = True
