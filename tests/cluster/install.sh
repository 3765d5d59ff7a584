#!/bin/sh
# What hosts are made of, where it is missing: sshd, ssh, rsync, ip, ss. Debian and Ubuntu; nothing is started by it.
set -eu
for name in sshd ssh-keygen rsync ip ss unshare nsenter; do
  PATH="$PATH:/usr/sbin:/sbin" command -v "$name" > /dev/null || missing=yes
done
[ "${missing:-}" ] || exit 0
[ "$(id -u)" = 0 ] || exit 0  # the tests skip, and say why
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then  # asked by each package that wants to start its server
  printf '#!/bin/sh\nexit 101\n' > "$policy"
  chmod +x "$policy"
  trap 'rm -f "$policy"' EXIT
fi
apt-get update --quiet=2
DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet=2 --no-install-recommends \
  openssh-server openssh-client rsync iproute2 util-linux
