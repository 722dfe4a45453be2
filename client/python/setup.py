"""Compiles the contract (proto/imprint/v1) into the package `imprint.v1` while the package is built.

Generated code is never committed: it lands in the build folder, or beside the sources of an editable
install. Start at `Build.run`.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
PROTO = HERE.parent.parent / "proto"
GENERATED = '"""The messages of imprint/v1, generated from the contract."""\n'


class Build(build_py):
    """Builds the package, then the messages into it."""

    def run(self) -> None:
        super().run()
        files = sorted(PROTO.glob("imprint/v1/*.proto"))
        if not files:
            raise SystemExit(
                f"imprint: the contract is not at {PROTO}/imprint/v1/*.proto. Build from a checkout of the "
                "repository (pip install ./client/python), where proto/ lies beside client/."
            )
        import grpc_tools
        from grpc_tools import protoc

        known = Path(grpc_tools.__file__).parent / "_proto"
        target = HERE / "src" if getattr(self, "editable_mode", False) else Path(self.build_lib).resolve()
        package = target / "imprint" / "v1"
        package.mkdir(parents=True, exist_ok=True)
        arguments = ["protoc", f"--proto_path={PROTO}", f"--proto_path={known}"]
        arguments += [f"--python_out={target}", f"--pyi_out={target}"]
        if protoc.main(arguments + [str(file) for file in files]) != 0:
            raise SystemExit("imprint: the contract does not compile; protoc says why above")
        (package / "__init__.py").write_text(GENERATED, encoding="utf-8")


setup(cmdclass={"build_py": Build})
