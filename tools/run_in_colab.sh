#!/usr/bin/env bash
# Run every chapter alone in an empty folder, in Colab's own image (the checkout is mounted at /course).
# The package is installed as a chapter's setup cell does it, and what Colab has must stay as it is.
set -euo pipefail
cp -r /course /tmp/course
python3 -m pip freeze --exclude-editable | sort >/tmp/before.txt
python3 -m pip install --quiet /tmp/course
python3 -m pip freeze --exclude-editable | sort >/tmp/after.txt
if comm -23 /tmp/before.txt /tmp/after.txt | grep .; then
    echo "The installation replaced the packages above, which Colab has."
    exit 1
fi
python3 -m venv --system-site-packages /tmp/nbval
/tmp/nbval/bin/python -m pip install --quiet nbval
status=0
for chapter in /course/book/[0-9]*.ipynb; do
    folder=$(mktemp -d)
    cp "$chapter" "$folder"
    (cd "$folder" && /tmp/nbval/bin/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=600 -p no:cacheprovider .) || status=1
done
exit $status
