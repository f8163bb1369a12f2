{{/* The prefix of every object's name: the release, and the chart where the release is not called after it. */}}
{{- define "instructloop.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* What selects a component's pods. Give it (list . "server"). */}}
{{- define "instructloop.selector" -}}
app.kubernetes.io/name: instructloop
app.kubernetes.io/instance: {{ (first .).Release.Name }}
app.kubernetes.io/component: {{ last . }}
{{- end -}}

{{/* Labels of an object of a component. Give it (list . "server"). */}}
{{- define "instructloop.labels" -}}
{{- $root := first . -}}
{{ include "instructloop.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- end -}}
