"""From checkpoint to bundle. `export(...)` is the whole of it; needs the `[export]` extra."""

__all__ = ["export"]


def __getattr__(name: str):
    if name == "export":
        from meta_deploy.export.pipeline import export

        return export
    raise AttributeError(f"module 'meta_deploy.export' has no attribute '{name}'")
