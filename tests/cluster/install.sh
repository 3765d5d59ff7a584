#!/bin/sh
# Install the programs that hosts need (sshd, ssh, rsync, ip, ss) on Debian and Ubuntu, without starting any service.
set -eu
for name in sshd ssh-keygen rsync ip ss unshare nsenter; do
  PATH="$PATH:/usr/sbin:/sbin" command -v "$name" > /dev/null || missing=yes
done
[ "${missing:-}" ] || exit 0
[ "$(id -u)" = 0 ] || exit 0  # The tests are skipped and print the reason.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then  # Packages ask this script before they start a service.
  printf '#!/bin/sh\nexit 101\n' > "$policy"
  chmod +x "$policy"
  trap 'rm -f "$policy"' EXIT
fi
apt-get update --quiet=2
DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet=2 --no-install-recommends \
  openssh-server openssh-client rsync iproute2 util-linux
