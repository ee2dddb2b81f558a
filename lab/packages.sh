#!/bin/sh
# Installs the Debian packages that demo, stories and benchmark use, without
# starting any of their services; with the word kubernetes also those that e2e needs to
# build Kubernetes. Without root it names what is missing.
set -eu

# program:package
need='nft:nftables curl:curl nginx:nginx-light psql:postgresql-client pg_ctlcluster:postgresql
      mariadbd:mariadb-server mariadb:mariadb-client redis-server:redis-server redis-benchmark:redis-tools
      sshd:openssh-server scp:openssh-client iperf3:iperf3 wrk:wrk openssl:openssl setpriv:util-linux
      haproxy:haproxy wg:wireguard-tools ip:iproute2 promtool:prometheus'

PATH=$PATH:/usr/sbin:/sbin
missing=
for n in $need; do
  command -v "${n%%:*}" >/dev/null 2>&1 || missing="$missing ${n#*:}"
done
if [ "${1:-}" = kubernetes ]; then
  for n in gcc:gcc pkg-config:pkg-config; do
    command -v "${n%%:*}" >/dev/null 2>&1 || missing="$missing ${n#*:}"
  done
  [ -e /usr/include/stdio.h ] || missing="$missing libc6-dev"
  pkg-config --exists libseccomp 2>/dev/null || missing="$missing libseccomp-dev"
fi
[ -n "$missing" ] || exit 0

if [ "$(id -u)" != 0 ]; then
  echo "missing programs; as root: apt-get install$missing" >&2
  exit 1
fi
echo "installing:$missing"
# Debian starts services when it installs them, unless this file says no.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
  printf '#!/bin/sh\nexit 101\n' >$policy
  chmod 755 $policy
  trap 'rm -f /usr/sbin/policy-rc.d' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086
apt-get install -y -qq --no-install-recommends $missing >/dev/null
