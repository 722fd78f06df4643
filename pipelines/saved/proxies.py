"""Whether the proxies that the environment names can be used to ask the Hugging Face hub."""

import urllib.request

__all__ = ["broken_proxy"]


def broken_proxy() -> str | None:
    """The proxy variables and why the hub's library cannot use them; None where it can, or where none is set.

    The proxies' addresses, in which there may be passwords, are not part of it.
    """
    names = [
        f"{name}_proxy" for name in ("all", "https", "http", "no") if name in urllib.request.getproxies_environment()
    ]
    if not names:
        return None
    try:
        import httpx
    except ImportError:  # an older library of the hub, which asks by other means
        return None
    try:
        httpx.Client().close()
    except ImportError:
        return f"{', '.join(names)}: a SOCKS proxy, which needs a package: pip install 'httpx[socks]'"
    except (ValueError, httpx.InvalidURL):
        return f"{', '.join(names)}: cannot be used; expected http://HOST:PORT, and HOST,HOST in no_proxy"
    return None
