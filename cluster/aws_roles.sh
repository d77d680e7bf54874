#!/usr/bin/env bash
# Makes the two AWS roles that cluster/up.yaml names. Once per account, and again to change the bucket:
#
#   cluster/aws_roles.sh YOUR-BUCKET
#
#   deft-ray-head     starts and ends workers, reads AWS's public image names, reads and writes the bucket
#   deft-ray-worker   reads and writes the bucket, nothing else
#
# Ray would make a role for the head by itself, but one that can neither read the image names nor give a role to the
# workers, which then could not write their checkpoints.
set -euo pipefail

bucket="${1:?usage: cluster/aws_roles.sh YOUR-BUCKET}"

statement() { # ACTIONS RESOURCES, each a JSON list
  printf '{"Effect": "Allow", "Action": %s, "Resource": %s}' "$1" "$2"
}

policy() { # STATEMENT...
  local IFS=,
  printf '{"Version": "2012-10-17", "Statement": [%s]}' "$*"
}

make_role() { # NAME POLICY
  local trust='{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "sts:AssumeRole",
    "Principal": {"Service": "ec2.amazonaws.com"}}]}'
  if ! aws iam get-role --role-name "$1" >/dev/null 2>&1; then
    aws iam create-role --role-name "$1" --assume-role-policy-document "$trust"
    aws iam create-instance-profile --instance-profile-name "$1"
    aws iam add-role-to-instance-profile --instance-profile-name "$1" --role-name "$1"
  fi
  aws iam put-role-policy --role-name "$1" --policy-name deft-ray --policy-document "$2"
}

storage="$(statement '["s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"]' \
  "[\"arn:aws:s3:::$bucket\", \"arn:aws:s3:::$bucket/*\"]")"
images="$(statement '["ssm:GetParameters"]' '["arn:aws:ssm:*:*:parameter/aws/service/*"]')"
machines="$(statement '["ec2:*"]' '["*"]')"
hand_on="$(statement '["iam:PassRole"]' '["arn:aws:iam::*:role/deft-ray-worker"]')"
spot="$(statement '["iam:CreateServiceLinkedRole"]' '["arn:aws:iam::*:role/aws-service-role/spot.amazonaws.com/*"]')"

make_role deft-ray-worker "$(policy "$storage")"
make_role deft-ray-head "$(policy "$storage" "$images" "$machines" "$hand_on" "$spot")"
