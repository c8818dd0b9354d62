"""Write what is shipped into the package: the files of every folder here by their hashes. Run it after a folder has changed."""

import json

from sculpt.shipped import CLONE, MANIFEST, described

if __name__ == "__main__":
    MANIFEST.write_text(json.dumps(described(CLONE), indent=1) + "\n")
    print(f"wrote {MANIFEST}")
