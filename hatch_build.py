"""Build hook: compiles the native CPU kernels into the package, for wheels and editable installs alike."""

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsBuildHook(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        source = Path(self.root) / "kernels" / "build.py"
        spec = importlib.util.spec_from_file_location("pdserve_kernels_build", source)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not module.build(source.parent):
            self.app.display_warning(
                "no C++ compiler for this platform: the package will compute with torch alone"
            )
        else:
            # no Python ABI is involved: the library is loaded by ctypes, so one wheel fits every Python of a
            # platform
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform}"
