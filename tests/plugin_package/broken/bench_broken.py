"""Cannot be imported: what it needs is nowhere to be found."""

import a_package_that_nobody_has  # noqa: F401
