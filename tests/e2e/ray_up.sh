#!/usr/bin/env bash
# `ray up cluster.yaml`, a job for each line of $WORK/jobs, `ray down`: on this machine alone, out of sight of all else.
# Runs as root inside `unshare --pid --net --mount`: `ray up` and `ray down` stop every Ray process that they see, sshd
# wants port 22, and nothing but the namespace's own loopback can be reached.
# WORK: a folder that is ours; ENVIRONMENT: the virtual environment; ROOT: the checkout; PYTHON_HOME: its interpreter's.
set -euo pipefail
: "${WORK:?}" "${ENVIRONMENT:?}" "${ROOT:?}" "${PYTHON_HOME:?}"

ip link set lo up
mkdir -p /tmp/ray "$WORK"/{ray,home,upper,scratch}
mount --bind "$WORK/ray" /tmp/ray
mount -t tmpfs -o size=2g tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd

# A home as new: what the cluster writes there (a shell's start file, an environment) goes with the folder.
home="$(getent passwd root | cut -d: -f6)"
cp -r /etc/skel/. "$WORK/home"
mkdir -p "$WORK/home/deepseek-ray/env" "$WORK/home/.config/pip" "$WORK/home/.ssh" "$WORK/home/.ray"
# Its programs name the environment by its own path: what pip writes must not reach the real one behind it.
mount -t overlay overlay -o "lowerdir=$ENVIRONMENT,upperdir=$WORK/upper,workdir=$WORK/scratch" "$ENVIRONMENT"
mount --bind "$ENVIRONMENT" "$WORK/home/deepseek-ray/env"
if [[ "$PYTHON_HOME" == "$home"/* ]]; then
    mkdir -p "$WORK/home/${PYTHON_HOME#"$home"/}"
    mount --bind "$PYTHON_HOME" "$WORK/home/${PYTHON_HOME#"$home"/}"
fi
mount --rbind "$WORK/home" "$home"
export HOME="$home"
printf '[global]\nno-index = true\nfind-links = %s\n' "$WORK/wheels" > ~/.config/pip/pip.conf
unset PIP_FIND_LINKS PIP_INDEX_URL PIP_EXTRA_INDEX_URL RAY_ADDRESS
chmod 700 ~/.ssh ~/deepseek-ray
(umask 077; printf 'DEEPSEEK_RAY_API_KEY=%s\n' "$(cat "$WORK/key")" > ~/deepseek-ray/secrets.env)

# Login by key only, on the loopback only.
ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519
ssh-keygen -q -t ed25519 -N '' -f "$WORK/host_key"
cp ~/.ssh/id_ed25519.pub ~/.ssh/authorized_keys
cat > "$WORK/sshd_config" <<SSHD
ListenAddress 127.0.0.1:22
HostKey $WORK/host_key
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
PidFile none
SSHD
/usr/sbin/sshd -f "$WORK/sshd_config" -E "$WORK/sshd.log"

export PATH="$HOME/deepseek-ray/env/bin:$PATH" RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
ray get-auth-token --generate > "$WORK/token"
cd "$ROOT"
ray up "$WORK/cluster.yaml" --yes --no-config-cache

echo "--- refused without the token: $(curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:8265/api/jobs/)"
while read -r job; do
    echo "--- job: $job"
    # shellcheck disable=SC2086  # a job is a line of words
    ray job submit --address http://127.0.0.1:8265 --working-dir . -- $job < /dev/null
done < "$WORK/jobs"
echo "--- described: $(curl -s -H "Authorization: Bearer $(cat ~/.ray/auth_token)" http://127.0.0.1:8265/api/jobs/)"
ray down "$WORK/cluster.yaml" --yes
echo "--- left: $(pgrep -c raylet || true)"
