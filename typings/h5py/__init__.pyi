# h5py ships no types. Everything in it is Any, so that strict checking looks at our side of each call.
from typing import Any

def __getattr__(name: str) -> Any: ...
