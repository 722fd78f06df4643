"""Checks that the proxies in the environment can be used to reach the Hugging Face hub."""

import urllib.request

__all__ = ["broken_proxy"]


def broken_proxy() -> str | None:
    """The proxy variables and why the hub's library cannot use them; None if it can, or if none is set.

    The addresses of the proxies are not part of it: they may contain passwords.
    """
    names = [
        f"{name}_proxy" for name in ("all", "https", "http", "no") if name in urllib.request.getproxies_environment()
    ]
    if not names:
        return None
    try:
        import httpx
    except ImportError:  # an older version of the hub's library, which does not use httpx
        return None
    try:
        httpx.Client().close()
    except ImportError:
        return f"{', '.join(names)}: a SOCKS proxy, which needs another package: pip install 'httpx[socks]'"
    except (ValueError, httpx.InvalidURL):
        return f"{', '.join(names)}: cannot be used; expected http://HOST:PORT, and HOST,HOST in no_proxy"
    return None
