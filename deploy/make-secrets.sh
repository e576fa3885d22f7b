#!/bin/sh
# Writes deploy/secrets/: an API key of the name "operator", and Grafana's password. Keeps what is
# there. The folder is closed to other users; the files are readable for the containers' users.
set -eu
folder=${1:-"$(dirname "$0")/secrets"}
mkdir -p "$folder"
chmod 700 "$folder"
random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
write() {
  if [ -e "$folder/$1" ]; then
    echo "$folder/$1 is there and is kept"
  else
    printf '%s\n' "$2" > "$folder/$1"
    chmod 444 "$folder/$1"
    echo "$folder/$1 is written"
  fi
}
write api_keys "operator:sk-$(random)"
write grafana_admin_password "$(random)"
