{{/* The name of everything: of the release, which must not be longer than a label. */}}
{{- define "infc.name" -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- end }}

{{/* What selects the pods. It must not change in an upgrade. */}}
{{- define "infc.selector" -}}
app.kubernetes.io/name: infc
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "infc.labels" -}}
{{ include "infc.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}
