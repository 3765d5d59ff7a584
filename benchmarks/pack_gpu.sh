#!/usr/bin/env bash
# Pack what `benchmarks/gpu_run.py` needs on a machine without a network, into a folder that git ignores.
#
#     benchmarks/pack_gpu.sh [FOLDER]      FOLDER: gpu-pack; GPU_PYTHON: 3.12, the Python version of that machine
#
# Left to the machine, because they are large or belong to its driver: torch and torchvision, with numpy and pillow, and
# pyarrow, pandas, matplotlib. gpu_run.py uses a packed distribution only if the machine lacks it or has it too old, so
# the small ones are all here. Versions are those of requirements.txt. Ray and botocore are repacked without the parts
# that segray does not use: 76 MB and 17 MB become 24 MB and 1 MB. Needs python3 with pip, and xz; takes about two minutes.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=$(realpath -m "${1:-$root/gpu-pack}")
python_version=${GPU_PYTHON:-3.12}

# tests/test_gpu_pack.py compares this list with the dependencies of segray and pytest.
small=(
  annotated-doc annotated-types anyio attrs boto3 certifi charset-normalizer click filelock fsspec h11 httpcore2 httpx2
  huggingface-hub idna iniconfig jinja2 jmespath jsonschema jsonschema-specifications markdown-it-py markupsafe mdurl
  msgpack obstore packaging pluggy protobuf psutil pydantic pydantic-core pygments pytest python-dateutil pyyaml referencing
  requests rich rpds-py s3transfer safetensors segmentation-models-pytorch shellingham six tenacity timm tqdm truststore
  typer typing-extensions typing-inspection urllib3
)

pin() { # NAME -> NAME==VERSION
  local line
  line=$(grep -m1 "^$1==" "$root/requirements.txt") || { echo "requirements.txt has no $1" >&2; exit 1; }
  echo "${line%% *}"
}
fetch() { # FOLDER NAME==VERSION...
  local tag tags=()
  for tag in manylinux_2_{28,27,24,17,12,5} manylinux2014 manylinux2010 manylinux1; do tags+=(--platform "${tag}_x86_64"); done
  python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "$python_version" --implementation cp \
    "${tags[@]}" --dest "$@"
}
unpack() { # NAME -> a folder with the content of its wheel
  fetch "$work" "$(pin "$1")"
  python3 -m zipfile -e "$work/$1"-*.whl "$work/$1"
}
repack() { # NAME -> NAME-VERSION.tar.xz
  local pinned
  pinned=$(pin "$1")
  XZ_OPT=-6e tar --create --xz --file "$out/${pinned/==/-}.tar.xz" --directory "$work/$1" .
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -rf "$out"
mkdir -p "$out"

unpack ray
cd "$work/ray/ray"
rm -rf jars rllib llm serve workflow dashboard/client
chmod +x core/src/ray/gcs/gcs_server core/src/ray/raylet/raylet
if command -v strip > /dev/null; then
  strip --strip-all core/src/ray/gcs/gcs_server core/src/ray/raylet/raylet
  strip --strip-unneeded _raylet.so
fi
repack ray

unpack botocore
cd "$work/botocore/botocore/data"
find . -mindepth 1 -maxdepth 1 -type d ! -name s3 ! -name sts ! -name 'sso*' ! -name signin -exec rm -rf {} +
repack botocore

cd "$root"
pinned=()
for name in "${small[@]}"; do pinned+=("$(pin "$name")"); done
fetch "$out" "${pinned[@]}"
echo "$python_version" > "$out/python-version"
du -sh "$out"
