#!/bin/sh
# Gives the S3 server the buckets `studies` and `mlflow`, each with a user who reaches that one
# alone. It runs at each `docker compose up`, so a new password counts.
set -eu
secret() { cat "/run/secrets/$1"; }
mc alias set s3 http://s3:9000 root "$(secret s3_root_password)" >/dev/null
for name in studies mlflow; do
  mc mb --ignore-existing "s3/$name"
  policy="/tmp/$name.json"
  printf '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": ["s3:*"],
    "Resource": ["arn:aws:s3:::%s", "arn:aws:s3:::%s/*"]}]}' "$name" "$name" >"$policy"
  mc admin policy create s3 "$name" "$policy"
  mc admin user add s3 "$name" "$(secret "s3_${name}_password")"
  # it refuses what is attached already, and says so
  mc admin policy attach s3 "$name" --user "$name" || mc admin user info s3 "$name" | grep -q "$name"
done
